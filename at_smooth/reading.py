"""Files of text that others may have written: read within limits, and checked before anything is made of them.

Nothing in them is trusted: not their size, how deep they are nested, how long their numbers are, or that a field is of
the type that it should be. Whatever is wrong, one error names the file and the place in it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import yaml

from at_smooth.exceptions import FileError

if TYPE_CHECKING:  # the command reads options by this module, and starts sooner without pydantic
    from pydantic import BaseModel, ValidationError

_T = TypeVar("_T")

#: Of a file, in bytes: 64 MiB of JSON or CSV, and 256 KiB of YAML, which takes seconds to read.
MOST_BYTES = 64 << 20
MOST_YAML = 256 << 10

#: How deep lists and mappings may be nested.
DEEPEST = 40

#: Digits of a whole number.
MOST_DIGITS = 100


class Source(Protocol):
    """A file: a path, or a resource of a package."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it for reading."""


class LimitError(ValueError):
    """Text that goes beyond one of the limits."""


def text_of(path: Source, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, whatever its line ends are.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        FileError: It is missing, unreadable, too large, or no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:  # a NUL in the path
        raise FileError(f"{str(path)!r} cannot be read ({error}).") from None
    if len(content) > most:
        raise FileError(f"{path} cannot be read: it has more than {most:,} bytes.")
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no text in UTF-8 ({error}).") from None


def yaml_of(path: Source, schema: type[BaseModel] | None = None) -> Any:
    """What a file of YAML holds, in plain values.

    Args:
        path: The file.
        schema: What it should hold, if that is known.

    Raises:
        FileError: It is missing, unreadable, beyond the limits, no YAML, or does not fit the schema.
    """
    return _parsed(path, parse_yaml, "YAML", MOST_YAML, schema)


def json_of(path: Source, schema: type[BaseModel] | None = None) -> Any:
    """What a file of JSON holds, in plain values; see :func:`yaml_of`."""
    return _parsed(path, parse_json, "JSON", MOST_BYTES, schema)


def csv_of(path: Source, text: str, row: Callable[[Mapping[str, str]], _T]) -> list[_T]:
    """The rows of a table in CSV whose first line names the columns.

    Args:
        path: Where the text comes from, for messages.
        text: The table.
        row: Makes a row of its cells, by column; raises ``ValueError`` or ``KeyError`` for one that does not fit.

    Raises:
        FileError: It is no CSV, or a row does not fit; the message names its line.
    """
    lines = csv.DictReader(text.splitlines(), strict=True)
    found = []
    try:
        for cells in lines:
            if None in cells or None in cells.values():
                raise ValueError("it has not as many cells as there are columns")
            found.append(row(cells))
    except KeyError as error:
        raise FileError(f"{path} cannot be read: it lacks the column {error}.") from None
    except (csv.Error, ValueError) as error:
        raise FileError(f"{path} cannot be read (line {lines.line_num}: {error}).") from None
    return found


def parse_yaml(text: str) -> Any:
    """What YAML says, in plain values.

    Raises:
        LimitError: It is nested too deep, has an alias, or a number too long.
        ValueError: It is no YAML, or says something else than plain values.
    """
    if len(text) > MOST_YAML:
        raise LimitError(f"it has more than {MOST_YAML:,} characters")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except LimitError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem}") from None
    except Exception as error:  # PyYAML's safe loader raises whatever a damaged value leads to
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        LimitError: It is nested too deep, or has a number too long.
        ValueError: It is no JSON.
    """
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise _too_deep() from None
    _refuse_depth(content)
    return content


def _first_problem(error: ValidationError) -> str:
    """What pydantic found wrong first, in words, with the place and the value."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"])) or "the content"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {_shortened(repr(problem['input']))})"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader within limits; a key that comes twice is refused."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise LimitError("it has an alias (*name); write the value out")
        self._depth += 1
        if self._depth > DEEPEST:
            raise _too_deep()
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MOST_DIGITS:
            raise LimitError(f"a whole number has {len(node.value):,} characters")
        return int(super().construct_yaml_int(node))

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, LimitError):
            raise
        except Exception:  # whatever '!!int ""' or '2020-13-45' leads to
            kind = node.tag.rpartition(":")[2]
            problem = f"{_shortened(repr(node.value))} is no value of the type {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for (_, name), count in Counter((key.tag, key.value) for key in keys).items():
            if count > 1:
                last = [key for key in keys if key.value == name][-1]
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} comes twice", last.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parsed(path: Source, parse: Callable[[str], Any], language: str, most: int, schema: type[BaseModel] | None) -> Any:
    text = text_of(path, most)
    try:
        content = parse(text)
    except LimitError as error:
        raise FileError(f"{path} cannot be read: {error}.") from None
    except ValueError as error:
        raise FileError(f"{path} is no {language}: {error}.") from None
    if schema is not None:
        _check(path, content, schema)
    return content


def _check(path: Source, content: Any, schema: type[BaseModel]) -> None:
    from pydantic import ValidationError

    try:
        schema.model_validate(content)
    except ValidationError as error:
        raise FileError(f"{path} does not hold what it should: {_first_problem(error)}.") from None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise LimitError(f"a whole number has {len(digits):,} digits")
    return int(digits)


def _refuse_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [
            value
            for each in level
            if isinstance(each, dict | list)
            for value in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> LimitError:
    return LimitError(f"it is nested more than {DEEPEST} deep")
