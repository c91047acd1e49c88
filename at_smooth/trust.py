"""Which code may be imported because a file names it: what the user has named, or has trained with before.

``module:name`` in a checkpoint or a recipe is code to import, and to call with options that stand in the same file. So
it is not the file's author who decides whether it runs, but the user: by naming it on the command line or in Python, or
by having trained with it. The first is remembered in the process, the second in a file of the user's account. What is
trusted is the name together with the file that the module comes from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from at_smooth.exceptions import PluginError, UntrustedError
from at_smooth.module_source import source_of
from at_smooth.reading import parse_json

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LARGEST = 10_000_000  # bytes of the file that are read
_WAIT = 10  # seconds for another process that writes it


class Code(NamedTuple):
    """A name as in ``package.module:name``, and the file of its module; None where there is no file."""

    name: str
    file: str | None


_named: set[Code] = set()


def module_of(name: str) -> str:
    """The module of ``package.module:name``.

    Raises:
        PluginError: It is not of that form.
    """
    if not _NAME.fullmatch(name):
        raise PluginError(f"{name!r} names no code. Write it as package.module:name.")
    return name.partition(":")[0]


def trust_code(names: Iterable[str]) -> None:
    """Trust code for the rest of this process, since the user names it.

    Args:
        names: ``package.module:name`` each; names of installed plugins, which have no colon, need no trust.

    Raises:
        PluginError: A name has a colon and is not of that form.
    """
    _named.update(_code(name) for name in names if _is_code(name))


def check(named: Mapping[str, str], source: Path | str) -> None:
    """Refuse what names code that is not trusted, before anything of it is imported.

    Args:
        named: What is named, by what it is to be, as in ``{"model": "os:system"}``; installed plugins are passed over.
        source: The file that names it, for the message.

    Raises:
        PluginError: A name has a colon and is not of the form ``package.module:name``.
        UntrustedError: Something is not trusted.
    """
    unknown = {}
    for what, name in named.items():
        try:
            code = _code(name) if _is_code(name) else None
        except PluginError as error:
            raise PluginError(f"{source}: {what}: {error}") from None
        if code and not _is_trusted(code):
            unknown[what] = code
    if not unknown:
        return
    names = list(dict.fromkeys(code.name for code in unknown.values()))
    words = ", ".join(f"{what} {code.name}" for what, code in unknown.items())
    raise UntrustedError(
        f"{source} names code that you have not trusted: {words}. It was not imported. If you know this code and want "
        f"it to run, add {' '.join(f'--trust {name}' for name in names)} (in Python: at_smooth.trust_code({names}))."
        f"{''.join(map(_known_elsewhere, dict.fromkeys(unknown.values())))}"
    )


def remember(names: Iterable[str]) -> str | None:
    """Trust code from now on, in every process of this account, since a training with it begins.

    Args:
        names: As for :func:`trust_code`; what has no file is left out.

    Returns:
        None, or why it could not be written down, in words.
    """
    codes = {code for name in names if _is_code(name) and (code := _code(name)).file is not None}
    if not codes:
        return None
    known, problem = _remembered()
    if codes <= known:
        return None
    if problem is None:
        problem = _append(codes)
    return problem and f"{', '.join(sorted(code.name for code in codes))} will not be trusted next time: {problem}."


def state_file() -> Path:
    """Where trusted code is remembered: in the folder AT_SMOOTH_STATE, or else in the user's state directory.

    Raises:
        OSError: There is no such directory, or it would depend on the working directory.
    """
    own = os.environ.get("AT_SMOOTH_STATE")
    if own:
        folder = Path(os.path.expanduser(own))
    else:
        from platformdirs import user_state_path

        folder = user_state_path("at-smooth", appauthor=False)
    if not folder.is_absolute():
        raise OSError(f"{folder} is no absolute path; set AT_SMOOTH_STATE to one")
    return folder / "trusted.jsonl"


def _is_code(name: str) -> bool:
    return ":" in name


def _code(name: str) -> Code:
    source = source_of(module_of(name))
    return Code(name, str(source.file) if source else None)


def _is_trusted(code: Code) -> bool:
    return code in _named or (code.file is not None and code in _remembered()[0])


def _known_elsewhere(code: Code) -> str:
    """What a message adds where the name is trusted, but of another file."""
    files = sorted(known.file for known in _named | _remembered()[0] if known.name == code.name and known.file)
    if not files:
        return ""
    here = f"here it is that of {code.file}" if code.file else "there is no such module here; run this in its folder"
    return f" You have trusted {code.name} of {' and '.join(files)}; {here}."


def _remembered() -> tuple[set[Code], str | None]:
    """What the file holds, and what is wrong with it; lines that are not ours are passed over."""
    try:
        path = state_file()
        if not path.exists():
            return set(), None
        if not path.is_file():
            return set(), f"{path} is no file"
        with path.open("rb") as file:
            lines = file.read(_LARGEST).splitlines()
    except OSError as error:
        return set(), str(error)
    return {code for line in lines if (code := _parsed(line))}, None


def _parsed(line: bytes) -> Code | None:
    try:
        entry = parse_json(line.decode())
    except ValueError:
        return None
    if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("file"), str):
        return Code(entry["name"], entry["file"])
    return None


def _append(codes: Collection[Code]) -> str | None:
    """Add lines to the file, what others add meanwhile kept; why that failed, if it did."""
    from filelock import FileLock

    try:
        path = state_file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_WAIT):
            new = sorted(set(codes) - _remembered()[0])
            with open(path, "a", encoding="ascii", opener=_private) as file:
                # Each on a line of its own, whatever a killed process left at the end.
                file.write("".join(f"\n{json.dumps(code._asdict())}" for code in new))
                file.flush()
                os.fsync(file.fileno())
    except (OSError, NotImplementedError) as error:  # the second where a file system knows no locks
        return str(error) or type(error).__name__
    return None


def _private(path: str, flags: int) -> int:
    """Open a file that, if it is new, nobody else may read or write: who writes it decides what is trusted."""
    return os.open(path, flags, 0o600)
