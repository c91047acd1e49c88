"""Accuracy over epochs (the paper's Figures 1, 3, A8 and A10)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from at_smooth import InputError, Run, Study
from at_smooth.analysis import Setting
from at_smooth.grouping import recorded
from at_smooth.overfitting import drops_of
from at_smooth.style import legend_above, new_figure, styles_of
from at_smooth_plugins.analyses.common import Drawing, Summary, draw_band

_TITLES = {"sa": "standard", "ra": "robust"}


class Curves(Drawing):
    """SA and RA over epochs, a line a setting: the mean over its seeds, and a band of one standard deviation.

    On the test set where every run looked at it, else on the validation set. With weight smoothing the line is that
    of the average, from the epoch at which there is one, and of the raw weights before.
    """

    measure: Literal["accuracy", "error"] = Field(
        default="accuracy", description="accuracy (Figures 3, A8 and A10), or its complement (Figure 1)"
    )
    weights: Literal["reported", "raw"] = Field(
        default="reported", description="which weights: raw, or reported: the average where there is one"
    )

    def draw(self, settings: list[Setting]) -> Study:
        """Panels for SA and RA."""
        part = _part(settings)
        rows = [row for setting in settings for row in self._rows(setting, part)]
        wide = self.width == "double"
        figure = new_figure(self.inches, 2.4 if wide else 3.4)
        axes = figure.subplots(1 if wide else 2, 2 if wide else 1, sharex=True, squeeze=False).flatten()
        styles = styles_of(setting.label for setting in settings)
        for panel, measure in zip(axes, ("sa", "ra"), strict=True):
            for number, setting in enumerate(settings):
                points = [row for row in rows if row["setting"] == setting.label and row[measure] is not None]
                values = [Summary(row["n"], row[measure], row[f"{measure}_sd"]) for row in points]
                draw_band(panel, [row["epoch"] for row in points], values, styles[setting.label], setting.label,
                          every=(0.05 * number, 0.25))  # fmt: skip  # staggered: lines often lie on each other
            for decay in _common_decays(settings):
                panel.axvline(decay, color="0.7", linestyle=":", linewidth=0.8, zorder=0)
            name = f"{'SA' if measure == 'sa' else 'RA'}" if self.measure == "accuracy" else f"{_TITLES[measure]} error"
            panel.set_ylabel(f"{part} {name} (%)")
        for panel in axes if wide else axes[-1:]:
            panel.set_xlabel("epoch")
        figure.align_ylabels()
        legend_above(figure)
        return Study(figure, {"curves": rows})

    def _rows(self, setting: Setting, part: str) -> list[dict[str, Any]]:
        """A row an epoch: the mean over seeds of what was measured then."""
        measured: dict[int, list[dict[str, float | None]]] = {}
        for run in setting.runs:
            for row in run.history:
                values = {measure: self._value(row, part, measure) for measure in ("sa", "ra")}
                if values["ra"] is not None or values["sa"] is not None:
                    measured.setdefault(int(row["epoch"] or 0), []).append(values)
        rows = []
        for epoch, found in sorted(measured.items()):
            line: dict[str, Any] = {"setting": setting.label, "part": part, "epoch": epoch, "n": len(found)}
            for measure in ("sa", "ra"):
                known = [value for values in found if (value := values[measure]) is not None]
                line |= Summary.of(known).columns(measure) if known else {measure: None, f"{measure}_sd": None}
            rows.append(line)
        return rows

    def _value(self, row: dict[str, Any], part: str, measure: str) -> float | None:
        value: float | None = row[f"{part}_{measure}"]
        if self.weights == "reported" and row[f"smoothed_{part}_{measure}"] is not None:
            value = row[f"smoothed_{part}_{measure}"]
        return value if value is None or self.measure == "accuracy" else 100 - value


def _part(settings: list[Setting]) -> str:
    """``test`` where all runs measured on it, else ``val``."""
    runs = [run for setting in settings for run in setting.runs]
    for part in ("test", "val"):
        if all(_measured(run, part) for run in runs):
            return part
    empty = next(run for run in runs if not _measured(run, "test") and not _measured(run, "val"))
    raise InputError(f"{empty.path} has measured nothing yet, or not what the others have. Leave it out, or train on.")


def _measured(run: Run, part: str) -> bool:
    return any(row[f"{part}_ra"] is not None for row in run.history)


def _common_decays(settings: list[Setting]) -> list[int]:
    """When the learning rate drops, where that is the same in all."""
    decays = [drops_of(recorded(run)) for setting in settings for run in setting.runs]
    return decays[0] if all(each == decays[0] for each in decays) else []
