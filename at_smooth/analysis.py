"""Analyses at work: runs by their settings, and the figure and the numbers of an analysis as files."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_smooth import registry
from at_smooth.contracts import studied
from at_smooth.exceptions import InputError, StorageError, TakenError
from at_smooth.files import create, usable_path
from at_smooth.grouping import by_setting
from at_smooth.interfaces import Analysis, Study
from at_smooth.run import Run
from at_smooth.style import as_png, as_svg


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: What distinguishes the setting, as the tables word it.
        runs: One a seed, in the order given.
    """

    label: str
    runs: tuple[Run, ...]


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """Bring runs together that differ in nothing but the seed, in the order in which their settings first appear.

    Raises:
        InputError: There are none, or one is given twice.
    """
    if not runs:
        raise InputError("there is nothing to analyse: give at least one run directory.")
    places = [run.path.resolve() for run in runs]
    twice = [str(run.path) for run, place in zip(runs, places, strict=True) if places.count(place) > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice; name each run once.")
    groups = by_setting(runs)
    names = _shortened([label for label, _ in groups])
    return [Setting(name, tuple(group)) for name, (_, group) in zip(names, groups, strict=True)]


def analyze(
    name: str, runs: Iterable[Run | Path | str], out: Path | str | None = None, options: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw an analysis of runs, and write the figure as PNG and SVG and each table behind it as CSV.

    Nothing is written over, and nothing is written before the analysis is done.

    Args:
        name: The plugin, as in ``curves``.
        runs: Run directories.
        out: The folder for the files; None for ``analyses/`` in the run where there is one run, else in the working
            directory, under a name that is free.
        options: The plugin's, by name.

    Returns:
        The files: PNG, SVG, then the tables.

    Raises:
        InputError: The plugin, an option or a run does not fit, or a file is there already.
        StorageError: A file cannot be written.
    """
    analysis: Analysis = registry.create("analyses", name, options)
    known = [run if isinstance(run, Run) else Run(run) for run in runs]
    stem = name.replace(":", ".")
    if out is None:
        folder = known[0].path / "analyses" if len(known) == 1 else Path("analyses")
    else:
        folder = usable_path(out)
        _refuse_taken(folder, stem)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder. Choose another --out.")
    study = studied(analysis, known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}. Choose another --out.") from None
    for each in [stem] if out is not None else _numbered(stem):
        with suppress(TakenError) if out is None else nullcontext():
            return _write(folder, each, study)
    raise StorageError(f"no name is free in {folder}.")


def _write(folder: Path, stem: str, study: Study) -> list[Path]:
    """Write the files of a study; the first of them, which each study has, takes the stem for all.

    Raises:
        TakenError: The stem is taken.
        StorageError: A file cannot be written.
    """
    _refuse_taken(folder, stem)
    contents = _contents(stem, study)
    for file, content in contents.items():
        create(folder / file, content)
    return [folder / file for file in contents]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of a study as CSV, each number in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _contents(stem: str, study: Study) -> dict[str, bytes]:
    names = {table: stem if len(study.tables) == 1 else f"{stem}-{table}" for table in study.tables}
    return {
        f"{stem}.png": as_png(study.figure),
        f"{stem}.svg": as_svg(study.figure),
        **{f"{names[table]}.csv": _encoded(rows) for table, rows in study.tables.items()},
    }


def _encoded(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return as_csv(rows).encode(errors="backslashreplace")  # a run's name may be no UTF-8


def _refuse_taken(folder: Path, stem: str) -> None:
    """Refuse a stem of which there is any file that an analysis may write.

    Raises:
        TakenError: There is.
    """
    own = [folder / f"{stem}{ending}" for ending in (".png", ".svg", ".csv")]
    for taken in [path for path in own if os.path.lexists(path)] or sorted(folder.glob(f"{stem}-[!0-9]*.csv")):
        raise TakenError(f"{taken} exists already. Choose another --out, or remove it.")


def _numbered(stem: str) -> Iterable[str]:
    return itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))


def _shortened(labels: list[str]) -> list[str]:
    """Labels whose numbers have three digits, where that leaves them different."""
    short = [re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number.group()):.3g}", label) for label in labels]
    return short if len(set(short)) == len(set(labels)) else labels
