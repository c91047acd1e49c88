"""How a network was constructed, as Python."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import keyword
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from at_smooth.export.definitions import Definitions, UnwritableError

_WIDTH = 100
_INDENT = "    "

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Construction:
    """The constructor calls of a network and of the modules in it, found by building it once more.

    Args:
        build: Builds the network, each time anew.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._calls: dict[int, _Call] = {}
        self._alive: list[nn.Module] = []  # so that no two modules have the same id
        kinds = {type(module) for module in build().modules()}
        with _wrapped_constructors(kinds, self._remember):
            self._network = build()

    def expression(self, definitions: Definitions) -> str:
        """An expression that constructs the network; what it names is put among the definitions.

        Raises:
            UnwritableError: An argument cannot be written as code.
        """
        return render(self._network, definitions, self._calls)

    def _remember(self, module: nn.Module, call: _Call) -> None:
        if id(module) not in self._calls:  # the outermost: a subclass calls its base's constructor, too
            self._calls[id(module)] = (_copied(call[0]), _copied(call[1]))
            self._alive.append(module)


def render(value: Any, definitions: Definitions, calls: dict[int, _Call] | None = None) -> str:
    """A value as a Python expression.

    Args:
        value: Numbers, text, containers, classes, functions, dataclasses, and modules whose calls are known.
        definitions: Gets the classes and functions that the expression names.
        calls: Constructor calls by the ids of modules.

    Raises:
        UnwritableError: It cannot be written.
    """

    def inner(part: Any) -> str:
        return render(part, definitions, calls)

    if isinstance(value, nn.Module):
        return _render_module(value, definitions, calls or {})
    if isinstance(value, enum.Enum):
        return f"{definitions.name_of(type(value))}.{value.name}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if type(value) in (tuple, torch.Size):
        return f"({', '.join(map(inner, value))}{',' if len(value) == 1 else ''})"
    if type(value) is list:
        return _call("", [inner(part) for part in value], "[]")
    if type(value) is dict:
        return _call("", [f"{inner(key)}: {inner(part)}" for key, part in value.items()], "{}")
    if type(value) is OrderedDict:
        definitions.bring("OrderedDict", "collections.OrderedDict", "from collections import OrderedDict")
        return _call("OrderedDict", [inner(list(value.items()))])
    if type(value) is set and value:
        return _call("", sorted(map(inner, value)), "{}")
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, functools.partial):
        definitions.bring("partial", "functools.partial", "from functools import partial")
        arguments = [inner(value.func), *map(inner, value.args)]
        return _call("partial", arguments + named_arguments(value.keywords, inner))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        name = definitions.name_of(type(value))
        return _call(name, named_arguments({field: getattr(value, field) for field in fields}, inner))
    if isinstance(value, type) or inspect.isroutine(value):
        return definitions.name_of(value)
    raise UnwritableError(f"its constructor takes {type(value).__name__}, which cannot be written as code")


def _render_module(module: nn.Module, definitions: Definitions, calls: dict[int, _Call]) -> str:
    name = definitions.name_of(type(module))
    if type(module) is nn.Sequential:  # it may have grown since it was made
        children = dict(module.named_children())
        if list(children) == [str(number) for number in range(len(children))]:
            return _call(name, [render(child, definitions, calls) for child in children.values()])
        return _call(name, [render(OrderedDict(children), definitions, calls)])
    if id(module) not in calls:
        raise UnwritableError(f"it was not seen how {name} was made")
    positional, named = calls[id(module)]
    arguments = [render(value, definitions, calls) for value in positional]
    return _call(name, arguments + named_arguments(named, lambda value: render(value, definitions, calls)))


def named_arguments(arguments: Mapping[str, Any], write: Callable[[Any], str]) -> list[str]:
    """Arguments by name, as they stand in a call.

    Raises:
        UnwritableError: A name is none that can be written so. Options in a file may be named as they like, and what is
            written is run.
    """
    for name in arguments:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UnwritableError(f"an argument is named {name!r}, which cannot be written as code")
    return [f"{name}={write(value)}" for name, value in arguments.items()]


def _call(name: str, arguments: list[str], brackets: str = "()") -> str:
    opening, closing = brackets[0], brackets[1]
    short = f"{name}{opening}{', '.join(arguments)}{closing}"
    if len(short) <= _WIDTH and "\n" not in short:
        return short
    body = "".join(f"{_INDENT}{line}\n" for argument in arguments for line in f"{argument},".splitlines())
    return f"{name}{opening}\n{body}{closing}"


def _copied(value: Any) -> Any:
    """The same containers anew, since a constructor may change those that it is given."""
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(part)) for key, part in value.items())
    return value


@contextmanager
def _wrapped_constructors(kinds: set[type[nn.Module]], remember: Callable[[nn.Module, _Call], None]) -> Iterator[None]:
    """Tell of every call of these classes' constructors."""

    def wrapped(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def constructor(self: nn.Module, *positional: Any, **named: Any) -> None:
            remember(self, (positional, named))
            original(self, *positional, **named)

        return constructor

    own = {kind: kind.__dict__.get("__init__") for kind in kinds}
    replacements = {kind: wrapped(kind.__init__) for kind in kinds}
    try:
        for kind, replacement in replacements.items():
            setattr(kind, "__init__", replacement)  # noqa: B010
        yield
    finally:
        for kind, constructor in own.items():
            if constructor is None:
                delattr(kind, "__init__")
            else:
                setattr(kind, "__init__", constructor)  # noqa: B010
