"""Tables of best, final and diff, as in the paper, and the curves of a run."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_smooth.checkpoint import write_atomically
from at_smooth.engine import Row
from at_smooth.exceptions import InputError
from at_smooth.recipe import CIRCUMSTANCES, Recipe
from at_smooth.run import Run, Summary

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


@dataclass(frozen=True)
class Cell:
    """One figure over one or several runs, in percent."""

    mean: float | None
    sd: float | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


#: A setting and its six figures.
TableRow = tuple[str, list[Cell]]


def summary_rows(summary: Summary) -> list[TableRow]:
    """One run's table: a row for the raw weights and, where there are any, one for the smoothed."""
    blocks = {weights: summary[weights] for weights in ("raw", "smoothed") if summary[weights]}
    return [(weights, [Cell(value) for value in _figures(block)]) for weights, block in blocks.items()]


def comparison_rows(runs: list[Run]) -> list[TableRow]:
    """The paper's table: a row a setting, by the reported weights.

    Runs that differ in nothing but the seed share a row, with mean and standard deviation over the seeds.
    """
    groups: dict[str, list[Summary]] = defaultdict(list)
    for run in runs:
        summary = run.summary
        groups[_setting(summary["recipe"])].append(summary)
    rows = []
    for label, group in zip(_labels([group[0]["recipe"] for group in groups.values()]), groups.values(), strict=True):
        columns = zip(*(_figures(summary[summary["reported"]]) for summary in group), strict=True)
        seeds = f" ({len(group)} runs)" if len(group) > 1 else ""
        rows.append((label + seeds, [_over_seeds(list(column)) for column in columns]))
    return rows


def format_table(rows: list[TableRow], style: str) -> str:
    """A table as ``markdown``, ``latex`` (booktabs) or ``csv``."""
    if style == "markdown":
        table = [HEADER, ["---"] + ["---:"] * len(_CELLS), *([label, *map(str, cells)] for label, cells in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in table)
    if style == "latex":
        body = [[_tex(label), *(_tex(str(cell)) for cell in cells)] for label, cells in rows]
        lines = [
            r"\begin{tabular}{lrrrrrr}",
            r"\toprule",
            " & ".join(HEADER) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in body),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines)
    if style == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["setting", *(f"{name}{part}" for name in _CELLS for part in ("", " sd"))])
        for label, cells in rows:
            writer.writerow([label, *(value for cell in cells for value in (cell.mean, cell.sd))])
        return text.getvalue().rstrip("\n")
    raise InputError(f"there is no table format '{style}'. Formats: text, markdown, latex, csv.")


def rich_table(rows: list[TableRow], title: str) -> Any:
    """The same for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("setting", overflow="fold")
    for name in _CELLS:
        table.add_column(name, justify="right", no_wrap=True)
    for label, cells in rows:
        table.add_row(label, *(str(cell).replace(" ± ", "\n± ") for cell in cells))  # six wide cells exceed 80 columns
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


def _figures(block: dict[str, Any]) -> list[float | None]:
    return [block[part][name] for part, name in _CELLS.values()]


def _over_seeds(values: list[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(None)
    return Cell(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _setting(recipe: dict[str, Any]) -> str:
    ignored = {"seed", *CIRCUMSTANCES}
    return repr(sorted((field, repr(value)) for field, value in recipe.items() if field not in ignored))


def _labels(recipes: list[dict[str, Any]]) -> list[str]:
    """What each setting is: method and smoothers, and whatever else is not the same in all of them."""
    neutral = {field: Recipe.model_fields[field].default for field in ("regularizer", "smoother")}
    hidden = {"seed", *CIRCUMSTANCES, "method", *neutral}
    labels = []
    for recipe in recipes:
        parts = [recipe["method"], *(recipe[field] for field in neutral if recipe[field] != neutral[field])]
        details = []
        for field, value in recipe.items():
            chooser = field.removesuffix("_options")
            if field in hidden:
                continue
            if chooser != field:  # options are compared among those who made the same choice
                twins = [other[field] for other in recipes if other[chooser] == recipe[chooser]]
                details += [
                    f"{key}={value[key]}" for key in value if any(twin.get(key) != value[key] for twin in twins)
                ]
            elif any(other.get(field) != value for other in recipes):
                details.append(f"{field}={value}")
        labels.append(" + ".join(parts) + (f" ({', '.join(details)})" if details else ""))
    return labels


def _tex(text: str) -> str:
    for plain, tex in (("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("±", r"$\pm$")):
        text = text.replace(plain, tex)
    return text
