"""A report on runs: one HTML file with tables, figures, recipes and commands, which needs no network to be read."""

from __future__ import annotations

import base64
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from at_smooth import recovery, registry
from at_smooth import report_sections as sections
from at_smooth._version import __version__
from at_smooth.exceptions import InputError, OptionError, RunError, UntrustedError
from at_smooth.files import create, create_first_free, refuse_taken_file
from at_smooth.following import Progress, history_so_far
from at_smooth.grouping import recorded
from at_smooth.overfitting import drops_of
from at_smooth.reading import text_of
from at_smooth.report import draw_curves
from at_smooth.run import Run
from at_smooth.style import as_png, as_svg
from at_smooth.threat import Threat

#: An SVG of more bytes than this is drawn as PNG: a scatter of ten thousand points is smaller so.
_LARGE = 400_000
_PIXELS = 125  # of the screen, for an inch of a figure: its small type reads well


@dataclass(frozen=True)
class Picture:
    """A figure in the page.

    Attributes:
        name: What drew it.
        source: The picture itself, as a ``data:`` address; empty where it could not be drawn.
        alt: What it shows, for those who cannot see it.
        width: In pixels, at most.
        note: What went wrong, if anything did.
    """

    name: str
    source: str
    alt: str
    width: int = 0
    note: str = ""


def write_report(
    runs: Sequence[Run | Path | str], out: Path | str | None = None, figures: Sequence[str] = ("curves",)
) -> Path:
    """Write a report on runs. Nothing is written over.

    Args:
        runs: Run directories, finished or not.
        out: The HTML file; None for ``report.html`` in the run where there is one run, else in the working directory,
            or the next name that is free.
        figures: Names of analyses. One that fails leaves a note in the report.

    Returns:
        Where the report is.

    Raises:
        InputError: The file exists, an analysis is unknown, or a run is damaged or given twice.
        StorageError: The file cannot be written.
    """
    known = [run if isinstance(run, Run) else Run(run) for run in runs]
    places = [run.path.resolve() for run in known]
    for run, place in zip(known, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{run.path} is given twice; name each run once.")
    refuse_taken_file(None if out is None else Path(out))
    for name in figures:
        registry.find("analyses", name)
    content = render(known, figures).encode(errors="backslashreplace")  # a run's name may be no UTF-8
    if out is None:
        folder = known[0].path if len(known) == 1 else Path()
        return create_first_free(_names(folder), content)
    create(Path(out), content)
    return Path(out)


def render(runs: Sequence[Run], figures: Sequence[str] = ()) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not runs:
        raise InputError("there is nothing to report on: give at least one run directory.")
    # Names of runs, and what plugins say, are text of others: all of it is escaped.
    environment = Environment(loader=PackageLoader("at_smooth"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    seen = recovery.at_a_glance(runs)
    text: str = environment.get_template("report.html").render(
        title=_title(runs),
        subject=_subject(runs),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        overview=sections.overview(runs),
        unfinished=[run.path for run in runs if not run.finished],
        results=sections.results(runs),
        overfitting=recovery.table(seen) if seen else None,
        pictures=[picture_of(name, runs) for name in figures],
        curves=[own_curves(run) for run in runs if history_so_far(run)],
        evaluations=sections.evaluations(runs),
        audits=sections.audits(runs),
        recipes=sections.recipes(runs),
        environments=sections.environments(runs),
        teachers=sections.teachers(runs),
        repeats=[_repeat(run) for run in runs],
    )
    return text


def picture_of(name: str, runs: Sequence[Run]) -> Picture:
    """What an analysis draws, of the finished runs alone where it cannot do with the others."""
    finished = [run for run in runs if run.finished]
    try:
        analysis = _created(name)
        try:
            study = analysis.study(runs)
            note = ""
        except InputError:
            if not finished or len(finished) == len(runs):
                raise
            study = analysis.study(finished)
            note = "of the finished runs"
        drawn = as_svg(study.figure)
        kind = "svg+xml"
        if len(drawn) > _LARGE:
            drawn, kind = as_png(study.figure, dpi=200), "png"
        width = round(_PIXELS * study.figure.get_figwidth())
    except UntrustedError:
        raise
    except Exception as error:  # a plugin's failure, whatever it is, costs its figure and not the report
        reason = str(error) or type(error).__name__
        return Picture(name, "", "", note=f"could not be drawn: {reason}")
    about = (type(analysis).__doc__ or name).strip().partition("\n")[0]
    return Picture(name, _data(drawn, kind), about, width, note)


def _created(name: str) -> Any:
    """The analysis, drawn as wide as a page where it has a choice, as ours do."""
    try:
        return registry.create("analyses", name, {"width": "double"})
    except OptionError:
        return registry.create("analyses", name)


def own_curves(run: Run) -> Picture:
    """RA and SA of one run over epochs, raw and smoothed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.png"
        draw_curves(history_so_far(run), drops_of(recorded(run)), file)
        drawn = file.read_bytes()
    alt = f"RA and SA of {run.path} over epochs, raw and smoothed"
    return Picture(str(run.path), _data(drawn, "png"), alt, 620, "" if run.finished else str(Progress.of(run)))


def _repeat(run: Run) -> dict[str, Any]:
    repeat, began = sections.commands(run)
    recipe = text_of(run.path / "recipe.yaml")
    return {"run": run.path, "repeat": repeat, "began": began, "recipe": recipe}


def _title(runs: Sequence[Run]) -> str:
    return f"Report on {runs[0].path.resolve().name}" if len(runs) == 1 else f"Report on {len(runs)} runs"


def _subject(runs: Sequence[Run]) -> str:
    """What all runs have in common, in a line."""
    recipes = [recorded(run) for run in runs]
    parts = [
        {str(recipe["dataset"]) for recipe in recipes},
        {str(recipe["model"]) for recipe in recipes},
        {_threat(recipe) for recipe in recipes},
        {f"{recipe['epochs']} epochs" for recipe in recipes},
    ]
    return ", ".join(values.pop() for values in parts if len(values) == 1)


def _threat(recipe: dict[str, Any]) -> str:
    try:
        return str(Threat(recipe["norm"], recipe["eps"]))
    except (KeyError, InputError) as error:
        raise RunError(f"a recipe names no threat ({error}).") from None


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _names(folder: Path) -> Iterator[Path]:
    yield folder / "report.html"
    for number in itertools.count(2):
        yield folder / f"report-{number}.html"
