"""Attacks made on one model and judged on another (the paper's Figure 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn

from at_smooth import PGD, InputError, Part, Run, Runtime, Study
from at_smooth.analysis import Setting
from at_smooth.interfaces import percent
from at_smooth.style import legend_above, new_figure, styles_of
from at_smooth.transfer import transfer
from at_smooth_plugins.analyses.common import (
    Examination,
    Moment,
    Summary,
    common_threat,
    draw_over_epochs,
    draw_steps,
    moments,
    stored,
    wrapped,
)


class TransferOverTime(Examination):
    """Transfer attacks: to and from an unseen model over checkpoints, or without one, among the runs themselves.

    With ``unseen``, left the unseen model's accuracy on attacks made on each run (lower: a stronger attack), right each
    run's accuracy on attacks made on the unseen model; over snapshots where every run kept some, else at best and
    final. Without it, a matrix of the settings: the mean over pairs of seeds, and on the diagonal each model attacked
    itself.
    """

    unseen: Path | None = Field(default=None, description="run or checkpoint of a model that is none of the runs")
    n_examples: int = Field(default=300, ge=1, description="at most so many test images, classes in proportion")
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")

    def draw(self, settings: list[Setting]) -> Study:
        """Two panels of lines, or a matrix."""
        return self._over_time(settings, self.unseen) if self.unseen else self._matrix(settings)

    def _transferred(
        self, models: dict[str, nn.Module], settings: list[Setting], part: Part
    ) -> dict[str, dict[str, Tensor]]:
        spec = PGD(threat=common_threat(settings), steps=self.steps, mode="eval")
        found = transfer(models, part, spec, seed=self.seed, runtime=Runtime.choose(self.device))
        return {source: dict(row) for source, row in found.right.items()}

    def _over_time(self, settings: list[Setting], path: Path) -> Study:
        part = Part(*self.examples(settings))
        unseen = self.place(stored_unseen(path, self))
        over_epochs, series = moments(settings, self.weights)
        rows = []
        for setting in settings:
            for run in setting.runs:
                models = {each.name: self.place(each.stored) for each in series[run.path]}
                right = self._transferred({"unseen": unseen, **models}, settings, part)
                rows += [_row(setting, run, each, right) for each in series[run.path]]
        figure = new_figure(self.inches, 2.6)
        styles = styles_of(setting.label for setting in settings)
        key = "epoch" if over_epochs else "checkpoint"
        panels = figure.subplots(1, 2)
        for axes, direction, title in zip(panels, _DIRECTIONS, _DIRECTIONS.values(), strict=True):
            values = {setting.label: _by(key, direction, setting.label, rows) for setting in settings}
            if over_epochs:
                draw_over_epochs(axes, values, styles, rows)
            else:
                draw_steps(axes, values, styles)
            axes.set_xlabel(key)
            axes.set_title(title, loc="left")
        panels[0].set_ylabel("accuracy under transfer (%)")
        legend_above(figure)
        return Study(figure, {"transfer": rows})

    def _matrix(self, settings: list[Setting]) -> Study:
        runs = {str(run.path): setting.label for setting in settings for run in setting.runs}
        if len(runs) < 2:
            raise InputError(
                "transfer needs a second model: give more runs, or one that was trained apart, as -O unseen=RUN."
            )
        part = Part(*self.examples(settings))
        models = {str(run.path): self.model(run) for setting in settings for run in setting.runs}
        right = self._transferred(models, settings, part)
        rows = [
            {"source": runs.get(source, source), "source_run": source, "target": runs[target], "target_run": target,
             "accuracy": percent(which)}
            for source, row in right.items()
            for target, which in row.items()
        ]  # fmt: skip
        labels = [setting.label for setting in settings]
        table = [[_cell(rows, source, target) for target in labels] for source in labels]
        return Study(_drawn_matrix(labels, np.array(table), self.inches), {"transfer": rows})


_DIRECTIONS = {"to_unseen": "judged on unseen", "from_unseen": "made on unseen"}


def stored_unseen(path: Path, options: Examination) -> Any:
    """The checkpoint of the unseen model, of a run or a file."""
    if path.is_dir():
        return stored(Run(path), "reported", options.checkpoint)
    from at_smooth.experiment import stored_weights

    return stored_weights(path)


def _row(setting: Setting, run: Run, moment: Moment, right: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "setting": setting.label,
        "run": str(run.path),
        "checkpoint": moment.name,
        "epoch": moment.epoch,
        "weights": moment.stored.kind,
        "to_unseen": percent(right[moment.name]["unseen"]),
        "from_unseen": percent(right["unseen"][moment.name]),
    }


def _by(key: str, direction: str, label: str, rows: list[dict[str, Any]]) -> dict[Any, Summary]:
    """The mean over seeds of a setting's accuracy at each checkpoint."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["setting"] == label:
            found.setdefault(row[key], []).append(row[direction])
    return {place: Summary.of(values) for place, values in found.items()}


def _cell(rows: list[dict[str, Any]], source: str, target: str) -> float:
    """The mean over pairs of seeds; of a setting with itself, over models that are attacked themselves."""
    pairs = [row for row in rows if (row["source"], row["target"]) == (source, target)]
    if source == target:
        pairs = [row for row in pairs if row["source_run"] == row["target_run"]]
    return Summary.of([row["accuracy"] for row in pairs]).mean


def _drawn_matrix(labels: list[str], table: np.ndarray[Any, Any], inches: float) -> Figure:
    figure = new_figure(inches, 0.75 + 0.36 * len(labels))
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(labels)), [str(number) for number, _ in enumerate(labels, start=1)])
    axes.set_yticks(range(len(labels)), [wrapped(f"{number}  {label}", 22) for number, label in enumerate(labels, 1)])
    axes.set(xlabel="judged on", ylabel="made on")
    axes.spines[:].set_visible(False)
    middle = (table.min() + table.max()) / 2
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize="small",
                  color="black" if value > middle else "white")  # fmt: skip
    figure.colorbar(image, label="accuracy (%)", aspect=25)
    return figure
