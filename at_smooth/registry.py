"""Plugins by name: entry points, discovered lazily and imported only when asked for.

Discovery reads package metadata and imports nothing. Two distributions that claim one name are an error that
names both; a plugin that fails to import breaks only the run that asks for it.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from at_smooth.exceptions import AtSmoothError, PluginError, nearest
from at_smooth.module_source import importable, source_of
from at_smooth.trust import check, module_of, trust_code

if TYPE_CHECKING:
    from at_smooth.interfaces import Plugin

#: The kinds of plugin, each the entry-point group ``at_smooth.<kind>``.
KINDS = ("methods", "regularizers", "smoothers", "evaluators", "datasets", "models", "analyses")

#: The group of packages that hold recipes as YAML; these are files, not plugins.
RECIPES = "recipes"


@dataclass(frozen=True)
class Entry:
    """One registered plugin: where it comes from, before anything of it is imported."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str

    def load(self) -> type[Plugin]:
        """Import the plugin's class.

        Raises:
            UntrustedError: It is reached by ``package.module:name``, which the user has not trusted.
            PluginError: The import fails, or what is there is no plugin.
        """
        singular = _singular(self.kind)
        check({singular: self.name}, "the recipe or an option")
        base = _interface(self.kind)
        try:
            with importable(module_of(self.name)) if ":" in self.name else nullcontext():
                plugin = EntryPoint(self.name, self.target, f"at_smooth.{self.kind}").load()
        except Exception as error:  # whatever a third party's module raises is its own failure, not ours
            said = (str(error).splitlines() or [""])[0]
            reason = f"fails to import: {type(error).__name__}: {said.removesuffix('.')}"
            if line := _line_in(module_of(self.name), error) if ":" in self.name else None:
                raise PluginError(f"{singular} '{self.name}' {reason} ({line}).") from error
            if ":" in self.name:
                raise PluginError(f"{singular} '{self.name}' {reason}. Write it as package.module:name.") from error
            raise PluginError(
                f"{singular} '{self.name}' of the distribution '{self.distribution}' {self.version} {reason}. "
                f"Update or uninstall that distribution."
            ) from error
        if ":" in self.name:
            plugin = _adopted(self.kind, plugin)
        origin = "" if ":" in self.name else f" of the distribution '{self.distribution}'"
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            function = ", or a function that makes a network" if self.kind == "models" else ""
            advice = (
                f"Name such a class{function}." if ":" in self.name else "Its entry point should name such a class."
            )
            raise PluginError(
                f"{singular} '{self.name}'{origin} is {plugin!r}, not a class derived from at_smooth.{base.__name__}. "
                f"{advice}"
            )
        if inspect.isabstract(plugin):
            missing = ", ".join(sorted(plugin.__abstractmethods__))
            raise PluginError(
                f"{singular} '{self.name}'{origin} lacks the method {missing}, "
                f"which at_smooth.{base.__name__} asks for."
            )
        return plugin


def _line_in(module: str, error: BaseException) -> str | None:
    """The last line of a module that an exception passed through; None where it did not get there."""
    file = Path(*module.split(".")).as_posix()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).as_posix().endswith((f"/{file}.py", f"/{file}/__init__.py"))
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


def entries(kind: str) -> list[Entry]:
    """All plugins of a kind, sorted by name; nothing is imported.

    Raises:
        PluginError: There is no such kind.
    """
    _check_kind(kind, (*KINDS, RECIPES))
    found = []
    for point in entry_points(group=f"at_smooth.{kind}"):
        name = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "?"
        found.append(Entry(kind, point.name, point.value, name, version))
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


def find(kind: str, name: str) -> Entry:
    """The one plugin of that kind and name.

    A name of the form ``package.module:Class`` reaches a class that no distribution registers, and among the models
    also a function that makes a network.

    Raises:
        PluginError: No plugin, or more than one, has that name.
    """
    _check_kind(kind, KINDS)
    if ":" in name:
        return Entry(kind, name, name, "an importable module", _source_digest(module_of(name)))
    everything = entries(kind)
    matches = [entry for entry in everything if entry.name == name]
    if not matches:
        names = [entry.name for entry in everything]
        raise PluginError(
            f"there is no plugin '{name}' among the {kind}{nearest(name, names)}. "
            f"Installed: {', '.join(sorted(set(names))) or 'none'}. See 'at-smooth plugins {kind}'."
        )
    if len(matches) > 1:
        owners = " and ".join(f"'{entry.distribution}' {entry.version}" for entry in matches)
        raise PluginError(f"'{name}' among the {kind} is claimed by {owners}. Uninstall one of them.")
    return matches[0]


def load(kind: str, name: str) -> type[Plugin]:
    """Import the plugin class of that kind and name; see :func:`find` and :meth:`Entry.load`."""
    return find(kind, name).load()


def build(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make a plugin from its name and its options, wherever the name comes from.

    Raises:
        UntrustedError: The name is ``package.module:name``, which the user has not trusted.
        PluginError: The plugin is unknown, ambiguous or broken, or its class is not as its interface says.
        OptionError: An option is unknown, of the wrong type or out of bounds.
    """
    from at_smooth.plugin_class import check_plugin
    from at_smooth.plugin_errors import in_words

    cls, subject = load(kind, name), f"{_singular(kind)} {name}"
    try:
        plugin = cls.build_from(options or {}, subject)
    except AtSmoothError:
        raise
    except Exception as error:  # of the author's own __init__ or validator
        raise PluginError(
            f"{subject} fails when it is made: {in_words(error)}. Better leave __init__ out: options are fields, and "
            f"what is learned goes into private attributes, with PrivateAttr(default_factory=...)."
        ) from error
    check_plugin(plugin)
    return plugin


def create(kind: str, name: str, options: Mapping[str, Any] | None = None, *, trusted: bool = True) -> Any:
    """Make a plugin from its name and its options.

    Args:
        kind: As in ``regularizers``.
        name: An installed plugin, or ``package.module:name``, which is imported.
        options: Values by name, as text or typed.
        trusted: Whether it is the user who names it. False for a name that may come out of a file, such as an option
            of another plugin: then ``package.module:name`` is imported only if the user has trusted it otherwise.

    Raises:
        UntrustedError: It is not trusted.
        PluginError: The plugin is unknown, ambiguous or broken.
        OptionError: An option is unknown, of the wrong type or out of bounds.
    """
    if trusted:
        trust_code([name])
    return build(kind, name, options)


def _check_kind(kind: str, kinds: Collection[str]) -> None:
    if kind not in kinds:
        raise PluginError(f"there is no plugin kind '{kind}'{nearest(kind, KINDS)}. Kinds: {', '.join(KINDS)}.")


def _singular(kind: str) -> str:
    return "analysis" if kind == "analyses" else kind[:-1]


def _source_digest(module: str) -> str:
    """A digest of a module's source, which is all the version that it has; empty where there is none."""
    source = source_of(module)
    try:
        return hashlib.sha256(source.file.read_bytes()).hexdigest()[:8] if source else ""
    except OSError:
        return ""  # loading it will say what is wrong


def _adopted(kind: str, found: Any) -> Any:
    """What ``package.module:name`` names, as a plugin where it can be one: functions and attacks of torchattacks."""
    if kind == "models" and callable(found) and not isinstance(found, type):
        from at_smooth.factory import Factory

        return Factory.around(found)
    if kind == "evaluators" and isinstance(found, type):
        from torchattacks.attack import Attack

        from at_smooth.library_evaluator import LibraryEvaluator

        return LibraryEvaluator.around(found) if issubclass(found, Attack) else found
    return found


def _interface(kind: str) -> type[Plugin]:
    from at_smooth import interfaces

    classes: dict[str, type[Plugin]] = {
        "methods": interfaces.Method,
        "regularizers": interfaces.Regularizer,
        "smoothers": interfaces.WeightSmoother,
        "evaluators": interfaces.Evaluator,
        "analyses": interfaces.Analysis,
        "datasets": interfaces.Dataset,
        "models": interfaces.Architecture,
    }
    return classes[kind]
