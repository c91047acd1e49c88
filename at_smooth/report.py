"""Tables of best, final and diff, as in the paper, and the curves of a run."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_smooth.confidence import accuracies_differ, differ_from_zero, means_differ, wilson
from at_smooth.exceptions import InputError
from at_smooth.files import write_atomically
from at_smooth.grouping import grouped
from at_smooth.measuring import Row
from at_smooth.output import printable
from at_smooth.run import Run, Summary
from at_smooth.tables import markdown_cell, tex

#: The columns of the paper's tables, and where each figure is in a block of ``summary.json``.
_CELLS = {
    "RA best": ("best", "test_ra"),
    "RA final": ("final", "test_ra"),
    "RA diff": ("diff", "ra"),
    "SA best": ("best", "test_sa"),
    "SA final": ("final", "test_sa"),
    "SA diff": ("diff", "sa"),
}
HEADER = ["setting", *_CELLS]
_ACCURACIES = [name for name in _CELLS if not name.endswith("diff")]

#: Fields of a recipe that say what SA and RA are accuracies of: rows that differ in one do not compare.
_MEASURED = ("dataset", "norm", "eps", "eval_steps")

#: Before a figure whose difference chance may have made.
_MARK = "~"
_TO = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One figure over one or several runs, in percent.

    Attributes:
        mean: The figure, or its mean; None where nothing was measured.
        sd: Standard deviation over the runs.
        interval: The 95 % interval of one run's accuracy.
        supported: Whether its difference is more than chance allows: an accuracy's from the first row's, a diff's
            from 0. None where there is nothing to compare, or not enough is known.
        unlike: In what an accuracy was measured otherwise than the first row's; it is then not set against that.
    """

    mean: float | None
    sd: float | None = None
    interval: tuple[float, float] | None = None
    supported: bool | None = None
    unlike: tuple[str, ...] = ()

    @property
    def figure(self) -> str:
        """The figure, marked where it is not supported."""
        if self.mean is None:
            return "-"
        return f"{_MARK if self.supported is False else ''}{self.mean:.2f}"

    @property
    def spread(self) -> str:
        """How far it spreads: over seeds, or by chance; empty where that is not known."""
        if self.sd is not None:
            return f"± {self.sd:.2f}"
        return f"{self.interval[0]:.1f}{_TO}{self.interval[1]:.1f}" if self.interval else ""

    def __str__(self) -> str:
        spread = f"({self.spread})" if self.interval and self.sd is None else self.spread
        return f"{self.figure} {spread}".rstrip()


#: A setting and its six figures.
TableRow = tuple[str, list[Cell]]


@dataclass(frozen=True)
class _Column:
    """One figure of a setting: its values over the runs, and on how many test examples each was measured."""

    values: list[float]
    n: int | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def differs(self, other: _Column) -> bool | None:
        """Whether two accuracies differ by more than chance allows; None where that cannot be known."""
        if not self.values or not other.values:
            return None
        if len(self.values) > 1 and len(other.values) > 1:
            return means_differ(self.values, other.values)
        return accuracies_differ(self.mean, self.n, other.mean, other.n) if self.n and other.n else None

    def cell(self, interval: bool, supported: bool | None = None, unlike: tuple[str, ...] = ()) -> Cell:
        """The figure as it is printed; several runs have a standard deviation, one has an interval."""
        if not self.values:
            return Cell(None)
        if len(self.values) > 1:
            return Cell(self.mean, statistics.stdev(self.values), None, supported, unlike)
        return Cell(self.mean, None, wilson(self.mean, self.n) if interval and self.n else None, supported, unlike)


def summary_rows(summary: Summary) -> list[TableRow]:
    """One run's table: a row for the raw weights and, where there are any, one for the smoothed."""
    columns = {weights: _columns([summary], weights) for weights in ("raw", "smoothed") if summary[weights]}
    return [
        (weights, [column.cell(name in _ACCURACIES) for name, column in figures.items()])
        for weights, figures in columns.items()
    ]


def comparison_rows(runs: list[Run]) -> list[TableRow]:
    """The paper's table: a row a setting, by the reported weights.

    Runs that differ in nothing but the seed share a row, with mean and standard deviation over the seeds. Accuracies
    are set against the first row's, and diffs against 0: over the seeds where there are some, else by the intervals.
    Accuracies on other images, or under another threat or attack, are set against nothing.
    """
    groups = [
        (label, [run.summary for run in group])
        for label, group in grouped(runs, [run.summary["recipe"] for run in runs])
    ]
    settings = [_columns(group) for _, group in groups]
    rows = []
    for (label, group), columns in zip(groups, settings, strict=True):
        unlike = _unlike(group, groups[0][1])
        seeds = f" ({len(group)} runs)" if len(group) > 1 else ""
        cells = []
        for name, column in columns.items():
            if name not in _ACCURACIES:
                supported = _is_a_difference(column, columns, name)
            else:
                supported = None if columns is settings[0] or unlike else column.differs(settings[0][name])
            cells.append(column.cell(name in _ACCURACIES, supported, unlike if name in _ACCURACIES else ()))
        rows.append((label + seeds, cells))
    return rows


def format_table(rows: list[TableRow], style: str) -> str:
    """A table as ``markdown``, ``latex`` (booktabs) or ``csv``; a line below it says what its marks mean.

    The CSV has every figure in full, and at the end of each row the intervals of the accuracies, whether each
    difference is supported (1, 0, or blank where there is nothing to compare), and in what the row was measured unlike
    the first.
    """
    notes = _notes(rows)
    if style == "markdown":
        table = [HEADER, ["---"] + ["---:"] * len(_CELLS), *([label, *map(str, cells)] for label, cells in rows)]
        lines = ["| " + " | ".join(map(markdown_cell, line)) + " |" for line in table]
        return "\n".join(lines + ([""] + [f"{note}." for note in notes] if notes else []))
    if style == "latex":
        body = [[tex(label), *(tex(str(cell)) for cell in cells)] for label, cells in rows]
        lines = [
            r"\begin{tabular}{lrrrrrr}",
            r"\toprule",
            " & ".join(HEADER) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in body),
            r"\bottomrule",
            *(rf"\multicolumn{{7}}{{l}}{{\footnotesize {tex(note)}.}} \\" for note in notes),
            r"\end{tabular}",
        ]
        return "\n".join(lines)
    if style == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        spread = [f"{name}{part}" for name in _CELLS for part in ("", " sd")]
        bounds = [f"{name}{part}" for name in _ACCURACIES for part in (" low", " high")]
        supported = [f"{name} supported" for name in _CELLS]
        writer.writerow(["setting", *spread, *bounds, *supported, "measured unlike the first"])
        for label, cells in rows:
            intervals = [cell.interval for name, cell in zip(_CELLS, cells, strict=True) if name in _ACCURACIES]
            writer.writerow([
                label,
                *(value for cell in cells for value in (cell.mean, cell.sd)),
                *(value for interval in intervals for value in interval or (None, None)),
                *(None if cell.supported is None else int(cell.supported) for cell in cells),
                "; ".join(cells[0].unlike),
            ])  # fmt: skip
        return text.getvalue().rstrip("\n")
    raise InputError(f"there is no table format '{style}'. Formats: text, markdown, latex, csv.")


def rich_table(rows: list[TableRow], title: str) -> Any:
    """The same for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
    table = Table(title=Text(title), collapse_padding=True, **look)
    table.add_column("setting", overflow="fold")
    for name in _CELLS:
        table.add_column(name, justify="right", no_wrap=True)
    for label, cells in rows:  # on two lines, since six wide cells exceed 80 columns
        table.add_row(Text(printable(label)), *(f"{cell.figure}\n{cell.spread}".rstrip() for cell in cells))
    table.caption = Text("\n".join(_notes(rows)), style="dim") if _notes(rows) else None
    table.caption_justify = "left"
    return table


def draw_curves(history: list[Row], decays: list[int], path: Path) -> None:
    """RA (solid) and SA (dashed) over epochs, raw and smoothed, on the test set where it was measured.

    Args:
        history: A row an epoch.
        decays: After how many epochs the learning rate drops.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    part = "test" if any(row["test_ra"] is not None for row in history) else "val"
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for prefix, label, colour in (("", "raw", "#0072B2"), ("smoothed_", "smoothed", "#D55E00")):  # colour-blind-safe
        for measure, line in (("sa", "--"), ("ra", "-")):
            points = [(row["epoch"], row[f"{prefix}{part}_{measure}"]) for row in history]
            points = [(epoch, value) for epoch, value in points if value is not None]
            if points:
                marker = "o" if len(points) == 1 else ""
                axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour,
                          label=f"{measure.upper()}, {label}")  # fmt: skip
    for number, epoch in enumerate(decay for decay in decays if decay < len(history)):
        axes.axvline(epoch, color="0.6", linestyle=":", linewidth=1, label=None if number else "learning rate drops")
    axes.set(xlabel="epoch", ylabel=f"{'test' if part == 'test' else 'validation'} accuracy (%)", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def _columns(group: list[Summary], weights: str | None = None) -> dict[str, _Column]:
    """The six figures of the runs of a setting, of the reported weights unless others are named."""
    blocks = [summary[weights or summary["reported"]] for summary in group]
    examples = [(summary.get("examples") or {}).get("test") for summary in group]
    columns = {}
    for name, (part, figure) in _CELLS.items():
        values = [block[part][figure] for block in blocks]
        columns[name] = _Column([value for value in values if value is not None], examples[0])
    return columns


def _unlike(group: list[Summary], first: list[Summary]) -> tuple[str, ...]:
    """In what the accuracies of two settings were measured that makes them figures of different things."""
    one, other = group[0]["recipe"], first[0]["recipe"]
    fields = [name for name in _MEASURED if one.get(name) != other.get(name)]
    known = zip(_test_images(group), _test_images(first), strict=True)
    if any(mine != theirs for mine, theirs in known if mine is not None and theirs is not None):
        fields.append("test images")
    return tuple(fields)


def _test_images(group: list[Summary]) -> tuple[int | None, str | None]:
    """How many test images the runs of a setting were measured on, and a digest of them; None where not known."""
    number = next((n for summary in group if (n := (summary.get("examples") or {}).get("test"))), None)
    return number, next((digest for summary in group if (digest := summary.get("test_set"))), None)


def _is_a_difference(diff: _Column, columns: dict[str, _Column], name: str) -> bool | None:
    """Whether best and final differ by more than chance allows: over the seeds, which pair them, else by intervals."""
    if len(diff.values) > 1:
        return differ_from_zero(diff.values)
    measure = name.split()[0]
    return columns[f"{measure} best"].differs(columns[f"{measure} final"]) if diff.values else None


def _notes(rows: list[TableRow]) -> list[str]:
    """What a table's signs mean, of those that are in it."""
    cells = [cell for _, figures in rows for cell in figures]
    unlike = [
        f"row {number} ({', '.join(figures[0].unlike)})"
        for number, (_, figures) in enumerate(rows, start=1)
        if figures[0].unlike
    ]
    notes = {
        f"low{_TO}high: 95 % interval of one run": any(cell.interval for cell in cells),
        f"{_MARK}: cannot be told apart from the first row's, or a diff from 0": any(
            cell.supported is False for cell in cells
        ),
        f"measured otherwise than the first row, and not set against it: {', '.join(unlike)}": bool(unlike),
    }
    return [note for note, needed in notes.items() if needed]
