"""Classes of plugins, looked at before anything runs: what they override, and what their methods take."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from types import FunctionType
from typing import Any

from at_smooth.exceptions import PluginError, nearest
from at_smooth.interfaces import Plugin
from at_smooth.plugin_errors import described, interface_of


def check_plugin(plugin: Plugin) -> None:
    """Refuse a plugin whose class cannot do what its interface says; see :func:`check_class`.

    Raises:
        PluginError: It is so, or its ``__init__`` did not call that of its base.
    """
    if not hasattr(plugin, "__pydantic_fields_set__"):
        raise PluginError(
            f"{described(plugin)}: its __init__ does not call super().__init__(**options), so it has no options. "
            f"Better leave __init__ out: options are fields, and what is learned goes into private attributes, with "
            f"PrivateAttr(default_factory=...)."
        )
    check_class(type(plugin))


@cache
def check_class(cls: type[Plugin]) -> None:
    """Refuse a class that overrides nothing, misspells a method, or takes other parameters than it is called with.

    Raises:
        PluginError: It is so; the message names the method and what it should be.
    """
    interface = interface_of(cls)
    if cls is interface:
        return
    wanted = _methods(interface)
    own = [name for name in wanted if _function(cls, name) is not _function(interface, name)]
    if any(not getattr(function, "__isabstractmethod__", False) for function in wanted.values()):
        _refuse_unknown(cls, interface, list(wanted))
        if not own:
            raise PluginError(
                f"{described(cls)} overrides no method of at_smooth.{interface.__name__}, so it changes nothing. "
                f"Override one of: {', '.join(wanted)}."
            )
    for name in own:
        _check_parameters(cls, name, list(inspect.signature(wanted[name]).parameters)[1:])


def _refuse_unknown(cls: type[Plugin], interface: type[Plugin], wanted: list[str]) -> None:
    for base in cls.__mro__:
        if not issubclass(base, interface) or base is interface:
            continue  # what is mixed in from elsewhere is its own
        for name, value in vars(base).items():
            known = name.startswith("_") or hasattr(interface, name) or name in _validators(base)
            if known or not isinstance(value, FunctionType):
                continue
            meant = nearest(name, wanted)
            raise PluginError(
                f"{described(cls)} has a method {name}, which at_smooth.{interface.__name__} does not have and "
                f"at-smooth never calls{meant}. Its methods: {', '.join(wanted)}. "
                f"Begin the names of helper methods with an underscore: _{name}."
            )


def _validators(cls: type[Plugin]) -> set[str]:
    decorated = cls.__pydantic_decorators__
    return {name for group in dataclasses.fields(decorated) for name in getattr(decorated, group.name)}


def _check_parameters(cls: type[Plugin], name: str, wanted: list[str]) -> None:
    function = _function(cls, name)
    signature = inspect.signature(getattr(cls, name))
    given = wanted if isinstance(function, staticmethod | classmethod) else ["self", *wanted]
    try:
        signature.bind(*given)
        taken = list(signature.parameters)[len(given) - len(wanted) :]
        fits = all(wanted.index(own) == place for place, own in enumerate(taken) if own in wanted)
    except TypeError:
        fits = False
    if not fits:
        raise PluginError(
            f"{described(cls)}: its method is {name}{signature}, and is called as {name}({', '.join(wanted)}). "
            f"Give it these parameters, in this order."
        )


def _methods(interface: type[Plugin]) -> dict[str, FunctionType]:
    """The methods that an author may override."""
    return {
        name: value
        for base in reversed(interface.__mro__)
        if issubclass(base, Plugin) and base is not Plugin
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and not name.startswith("_")
    }


def _function(cls: type, name: str) -> Any:
    return inspect.getattr_static(cls, name)
