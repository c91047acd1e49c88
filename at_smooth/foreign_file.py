"""Files that ``torch.save`` wrote elsewhere: read without importing, making or calling anything that they name.

Training scripts put more into a checkpoint than tensors: an ``argparse.Namespace``, NumPy scalars, a configuration, the
whole model. ``torch.load(weights_only=True)`` refuses each of these. Here an inert object stands in for whatever class
or function the file names, so that the tensors beside it can be read. The classes themselves are never looked up.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from at_smooth import checkpoint
from at_smooth.exceptions import CheckpointError

_WHAT = "file of weights"

#: A file in an archive that is no checkpoint: what wrote it, and how to get at the weights.
_ARCHIVES = {
    "constants.pkl": ("a TorchScript archive", "torch.jit.load({file!r}).state_dict()"),
    "archive_format": ("an archive of torch.export", "torch.export.load({file!r}).state_dict"),
}


class LeftOut:
    """Stands in for an object of a class that a file names; it ignores what it is made of.

    Attributes:
        name: The class or function, as the file names it.
    """

    name = ""

    def __new__(cls, *args: Any, **options: Any) -> LeftOut:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(file: Path) -> Any:
    """Read tensors and plain values onto the CPU; everything else in the file is a :class:`LeftOut`.

    Raises:
        CheckpointError: The file is missing, damaged, no file of ``torch.save``, or a whole pickled object.
    """
    _refuse_archives(file)
    names = _foreign_names(file)
    stand_ins: list[Any] = [(type("LeftOut", (LeftOut,), {"name": name}), name) for name in names]
    try:
        with safe_globals(stand_ins):
            content = checkpoint.read(file, _WHAT)
    except CheckpointError as error:
        if names:
            error.add(f"It names {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}.")
        raise
    if isinstance(content, LeftOut):
        raise CheckpointError(
            f"{file} is a whole pickled object ({content.name}), not a state dict; it was not opened, since such a "
            f"file could run code. If you trust it, save its weights: torch.save("
            f"torch.load({str(file)!r}, weights_only=False).state_dict(), 'weights.pt')"
        )
    return content


def _foreign_names(file: Path) -> list[str]:
    """The classes and functions that a file names, beside those of torch that make tensors."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of a damaged file, or one of torch before 1.6, whose names are refused as they come
        return []


def _refuse_archives(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            held = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile):  # said by the reader
        return
    for name, (what, way) in _ARCHIVES.items():
        if name in held:
            raise CheckpointError(
                f"{file} is {what}, which holds code; it was not opened. If you trust it, save its weights: "
                f"torch.save({way.format(file=str(file))}, 'weights.pt')"
            )
