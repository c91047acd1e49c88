"""The versions that a run depends on: at-smooth's, its plugins', and those of the libraries that do the arithmetic."""

from __future__ import annotations

from importlib import metadata

from at_smooth import registry
from at_smooth._version import __version__
from at_smooth.recipe import PLUGIN_FIELDS, Recipe

_LIBRARIES = ("torch", "torchattacks", "numpy")


def plugin_versions(recipe: Recipe) -> dict[str, str]:
    """Distribution and version of each plugin that a recipe names; a digest of the source where there is none."""
    found = {field: registry.find(kind, getattr(recipe, field)) for field, kind in PLUGIN_FIELDS.items()}
    return {f"{field} {entry.name}": f"{entry.distribution} {entry.version}" for field, entry in found.items()}


def versions(recipe: Recipe) -> dict[str, str]:
    """What has to be the same for a run to continue as it began."""
    libraries = {name: installed(name) or "not installed" for name in _LIBRARIES}
    return {"at-smooth": __version__, **libraries, **plugin_versions(recipe)}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
