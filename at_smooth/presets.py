"""Recipes by name: presets and the tables of a paper, shipped as YAML by any distribution.

An entry point of the group ``at_smooth.recipes`` names a package; each of its ``NAME.yaml`` is a preset, or a table if
it has ``groups``; ``styles.yaml`` is neither (:mod:`at_smooth.style`). A preset's fields may depend on the data set
(``for_dataset``) and bring options for plugins that a row may choose (``plugin_defaults``). A table's rows are its
groups times its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from at_smooth import registry
from at_smooth.exceptions import InputError, PluginError, nearest
from at_smooth.reading import yaml_of
from at_smooth.recipe import PLUGIN_FIELDS, Recipe, merge, plugins_in, read_yaml
from at_smooth.style import STYLES
from at_smooth.trust import trust_code

Fields = dict[str, Any]

_META = ("based_on", "for_dataset", "plugin_defaults")


@dataclass(frozen=True)
class TableRow:
    """One row of a paper's table.

    Attributes:
        name: ``group/setting``.
        changes: Fields on top of the table's preset.
        paper: What the paper reports, in percent: RA best, RA final, SA best, SA final.
    """

    name: str
    changes: Fields
    paper: tuple[float, float, float, float]


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name: As in ``table-1``.
        title: What it shows.
        preset: Name of the preset that its rows share.
        last5: Whether "final" is the mean of the last five epochs.
        rows: Its rows.
    """

    name: str
    title: str
    preset: str
    last5: bool
    rows: tuple[TableRow, ...]

    def recipe(self, row: TableRow, changes: Mapping[str, Any], preset: str | None = None) -> Recipe:
        """The recipe of a row, with further changes on top; ``preset`` takes the place of the table's own."""
        return Recipe(**resolve(_content(preset or self.preset), merge(row.changes, changes)))


def names() -> list[str]:
    """All presets and tables, by name."""
    return sorted(_files())


def tables() -> list[Table]:
    """All tables."""
    return [table(name) for name in names() if "groups" in _content(name)]


def table(name: str) -> Table:
    """The table of that name.

    Raises:
        InputError: There is none.
    """
    content = _content(name)
    if "groups" not in content:
        raise InputError(f"'{name}' is a preset, not a table. Tables: see 'at-smooth reproduce'.")
    try:
        rows = []
        for group, details in content["groups"].items():
            for setting, paper in details["paper"].items():
                changes = merge(merge(content.get("shared", {}), details["recipe"]), content["settings"][setting])
                rows.append(TableRow(f"{group}/{setting}", changes, tuple(paper)))
        return Table(name, content["title"], content["based_on"], content.get("final") == "last5", tuple(rows))
    except (KeyError, TypeError, AttributeError) as error:
        raise PluginError(f"the table '{name}' is not of the form that docs/recipes.md gives ({error!r}).") from None


def recipe_from(source: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe that a file, a preset (``paper``) or a table's row (``table-1/cifar10/kd-swa``) describes.

    Args:
        source: A path, or a name.
        changes: Fields on top.

    Raises:
        UntrustedError: A file names code that the user has not trusted.
        InputError: There is no such file, preset or row, or it is no recipe.
    """
    if Path(source).is_file() or source.endswith((".yaml", ".yml")):
        own = read_yaml(Path(source))
        base = _content(own["based_on"]) if "based_on" in own else {}
        trust_code([*plugins_in(changes).values(), *_plugins_of(base)])  # the user's, and those of what is installed
        return Recipe(Path(source), **resolve(layer(own, base), changes))
    name, _, row_name = source.partition("/")
    content = _content(name)
    if "groups" not in content:
        return Recipe(**resolve(content, changes))
    found = table(name)
    for row in found.rows:
        if row.name == row_name:
            return found.recipe(row, changes)
    rows = [f"{name}/{row.name}" for row in found.rows]
    raise InputError(f"{name} has no row '{row_name}'{nearest(source, rows)}. Rows: {', '.join(rows)}.")


def resolve(preset: Fields, changes: Mapping[str, Any]) -> Fields:
    """A preset with changes on top, its conditional parts decided.

    What depends on the data set lies between the preset and the changes; options for plugins lie below both.
    """
    for part in ("for_dataset", "plugin_defaults"):
        if not isinstance(preset.get(part, {}), dict):
            raise InputError(f"recipe: {part} should hold one line for each choice, not {preset[part]!r}.")
    fields = {field: value for field, value in preset.items() if field not in _META}
    dataset = changes.get("dataset", fields.get("dataset"))
    fields = merge(merge(fields, _chosen(preset.get("for_dataset", {}), dataset, "for_dataset")), changes)
    for field, by_name in preset.get("plugin_defaults", {}).items():
        defaults = _chosen(by_name, fields.get(field), f"plugin_defaults: {field}")
        own = fields.get(f"{field}_options", {})
        fields[f"{field}_options"] = {**defaults, **own} if isinstance(own, dict) else own
    return fields


def _chosen(by_name: Any, name: Any, subject: str) -> Fields:
    """The fields that belong to one name."""
    if name is not None and not isinstance(name, str):
        return {}  # the recipe will say what is wrong with it
    fields = by_name.get(name, {}) if isinstance(by_name, dict) else by_name
    if not isinstance(fields, dict):
        raise InputError(f"recipe: {subject} should hold one line for each choice, not {fields!r}.")
    return fields


def layer(preset: Fields, base: Fields) -> Fields:
    """A preset on top of the one that it is based on."""
    merged = dict(base)
    for key, value in preset.items():
        below = merged.get(key)
        merged[key] = layer(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _plugins_of(preset: Fields) -> Iterator[str]:
    """The plugins that a preset names, those that depend on the data set among them."""
    for field, value in preset.items():
        if field in PLUGIN_FIELDS and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _plugins_of(value)


def _content(name: Any, above: tuple[str, ...] = ()) -> Fields:
    """What a preset or a table holds, on top of what it is based on.

    Args:
        name: Its name.
        above: The presets that are based on it.
    """
    files = _files()
    if not isinstance(name, str) or name not in files:
        known = ", ".join(files) or "none"
        raise InputError(f"there is no recipe file or preset '{name}'{nearest(str(name), files)}. Presets: {known}.")
    if name in above:
        raise PluginError(f"the recipe '{name}' is based on itself: {' on '.join([*above, name])}.")
    content = yaml_of(files[name])
    if not isinstance(content, dict):
        raise PluginError(f"the recipe '{name}' should hold 'field: value' lines.")
    if "groups" not in content and "based_on" in content:
        return layer(content, _content(content["based_on"], (*above, name)))
    return content


def _files() -> dict[str, Any]:
    found: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for entry in registry.entries(registry.RECIPES):
        try:
            folder = resources.files(entry.target)
        except Exception as error:  # whatever a third party's package raises is its own failure
            raise PluginError(
                f"the recipes of '{entry.distribution}' cannot be read: {type(error).__name__}: {error}."
            ) from error
        for file in folder.iterdir():
            if not file.name.endswith(".yaml") or file.name == STYLES:
                continue
            name = file.name.removesuffix(".yaml")
            if name in found:
                raise PluginError(
                    f"the recipe '{name}' is claimed by '{owner[name]}' and '{entry.distribution}'. Uninstall one."
                )
            found[name], owner[name] = file, entry.distribution
    return dict(sorted(found.items()))
