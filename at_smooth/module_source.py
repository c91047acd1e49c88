"""Which file an import would run, found without importing anything."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A module's file.

    Attributes:
        root: The folder on the Python path where the search for it ends, symbolic links resolved.
        file: The file below that folder, as the import would name it. Links below the root are not resolved: a link to
            somebody's module is not that module, since other files lie beside it.
    """

    root: Path
    file: Path


class _Found(NamedTuple):
    """Where a module's code is, and where its submodules are searched; None where there is none."""

    file: str | None
    folders: Sequence[str] | None


def source_of(module: str) -> Source | None:
    """The file that importing a module would run, parents of a submodule found but not imported.

    Args:
        module: As in ``package.module``.

    Returns:
        None where there is no such module, or no file, as for modules built into Python.
    """
    try:
        found = _find(module)
        if found is None or found.file is None:
            return None
        path = Path(found.file).absolute()
        root = path.parents[module.count(".") + (found.folders is not None)]
        return Source(root.resolve(), root.resolve() / path.relative_to(root))
    except Exception:  # an import hook of anyone's may fail in any way; the import itself will say what is wrong
        return None


@contextmanager
def importable(module: str) -> Iterator[None]:
    """Let an import find a module of the working directory, as ``python -m`` does.

    The directory is not on the path while a module is imported that lies elsewhere, so a folder's other files cannot
    take the place of what that module imports.
    """
    source = source_of(module)
    with _working_directory_on_path(source is None or source.root == _working_directory()):
        yield


def _find(module: str) -> _Found | None:
    loaded = sys.modules.get(module)
    if loaded is not None:  # an import would take it as it is
        return _Found(getattr(loaded, "__file__", None), getattr(loaded, "__path__", None))
    parent = module.rpartition(".")[0]
    if not parent:
        with _working_directory_on_path(True):
            spec = find_spec(module)  # of a name without dots: imports nothing
        return _found(spec) if spec else None
    package = _find(parent)
    if package is None or package.folders is None:
        return None
    return _find_in(module, package.folders)


def _find_in(module: str, folders: Iterable[str]) -> _Found | None:
    """A submodule in its package's folders, as the import system looks for it; packages may lack an __init__.py."""
    portions: list[str] = []
    for folder in folders:
        finder = pkgutil.get_importer(folder)
        spec = finder.find_spec(module) if finder else None
        if spec is not None and spec.loader is not None:
            return _found(spec)
        if spec is not None:
            portions += spec.submodule_search_locations or []
    return _Found(None, portions) if portions else None


def _found(spec: ModuleSpec) -> _Found:
    folders = spec.submodule_search_locations
    return _Found(spec.origin if spec.has_location else None, None if folders is None else list(folders))


def _working_directory() -> Path | None:
    try:
        return Path.cwd().resolve()
    except OSError:  # it was removed
        return None


@contextmanager
def _working_directory_on_path(wanted: bool) -> Iterator[None]:
    here = _working_directory() if wanted else None
    if here is None:
        yield
        return
    sys.path.insert(0, os.fspath(here))
    try:
        yield
    finally:
        with suppress(ValueError):  # what is imported may change the path
            sys.path.remove(os.fspath(here))
