"""What several analyses share: their options, the models and images that they look at, and how they draw."""

from __future__ import annotations

import math
import re
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from at_smooth import PGD, Adversary, Analysis, InputError, Part, Run, Runtime, Study, Threat
from at_smooth.analysis import Setting, settings_of
from at_smooth.data import as_float, stratified_subset
from at_smooth.experiment import Stored, Weights, Which, stored_weights
from at_smooth.runtime import fenced_randomness, limited_threads
from at_smooth.style import COLUMN, DOUBLE, Style, paper_style, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BATCH = 250  # images at once


class Drawing(Analysis):
    """An analysis whose figure is as wide as a paper's column, or as its page."""

    width: Literal["column", "double"] = Field(
        default="column", description=f"how wide the figure is: {COLUMN} or {DOUBLE} inches"
    )

    @property
    def inches(self) -> float:
        """The width."""
        return COLUMN if self.width == "column" else DOUBLE

    def study(self, runs: Sequence[Run]) -> Study:
        """The runs by their settings, drawn in our style."""
        settings = settings_of(runs)
        with paper_style():
            return self.draw(settings)

    @abstractmethod
    def draw(self, settings: list[Setting]) -> Study:
        """The figure and its tables."""


class Examination(Drawing):
    """An analysis that looks at models from checkpoints, on test images, in eval mode and float32.

    What it draws at random follows from the seed; models and torch's global generators are as before when it is done.
    """

    weights: Weights = Field(
        default="reported", description="which weights: raw, smoothed, or reported: the smoothed where there are any"
    )
    checkpoint: Which = Field(default="final", description="the last epoch, or the best by validation")
    n_examples: int = Field(
        default=200, ge=1, description="at most so many test images, drawn by the seed, classes in proportion"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="decides every random draw")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")

    def study(self, runs: Sequence[Run]) -> Study:
        """Look at the runs, with all randomness inside a fence."""
        settings = settings_of(runs)
        threads = settings[0].runs[0].recipe.threads
        with paper_style(), limited_threads(threads), fenced_randomness(self.seed, "analysis"):
            return self.draw(settings)

    def place(self, stored: Stored) -> nn.Module:
        """The network of a checkpoint: in eval mode, frozen, in float32, on the device."""
        return stored.network().float().requires_grad_(False).to(Runtime.choose(self.device).device)

    def model(self, run: Run) -> nn.Module:
        """The network of a run, of the checkpoint and the weights that the options name."""
        return self.place(stored(run, self.weights, self.checkpoint))

    def examples(self, settings: Sequence[Setting], classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Test images that the runs share, (N, C, H, W) float32 in [0, 1], and their labels (N,), on the device.

        Args:
            settings: Whose.
            classes: Only of these; None for all.

        Raises:
            InputError: There are none, or the runs are of different data.
        """
        part = common_test_part(settings)
        if classes is not None:
            of_them = torch.isin(part.labels, torch.tensor(list(classes)))
            part = Part(part.images[of_them], part.labels[of_them])
        chosen = stratified_subset(part.labels, min(self.n_examples, part.n), self.seed)
        device = Runtime.choose(self.device).device
        return as_float(part.images[chosen]).to(device), part.labels[chosen].to(device)

    def perturbed(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, steps: int) -> Tensor:
        """PGD of so many steps from a random start, the same draws for every model."""
        adversary = Adversary(model, PGD(threat=threat, steps=steps, mode="eval"))
        with fenced_randomness(self.seed, "attack"):
            return in_batches(adversary, images, labels)


def stored(run: Run, weights: Weights, which: Which) -> Stored:
    """A run's checkpoint.

    Raises:
        InputError: The run is not finished and so has no final one, or has no such weights.
    """
    if which == "final" and not run.checkpoint("final").is_file():
        raise InputError(
            f"{run.path} has no final checkpoint. Finish it (at-smooth train --out {run.path} --resume), or choose "
            f"--checkpoint best."
        )
    return stored_weights(run.path, weights, which)


@dataclass(frozen=True)
class Moment:
    """A checkpoint of a run.

    Attributes:
        name: ``best`` or ``final``, or the epoch's number in words.
        epoch: The epoch, counted from 1.
        stored: The weights.
    """

    name: str
    epoch: int
    stored: Stored


def moments(settings: Sequence[Setting], weights: Weights) -> tuple[bool, dict[Path, list[Moment]]]:
    """The checkpoints of each run, by its path: its snapshots where every run kept some, else best and final.

    Of a snapshot the reported weights are the smoothed ones once there are any, and the raw ones before; where smoothed
    ones are wanted, snapshots from before are left out.

    Returns:
        Whether they are snapshots over epochs, and the checkpoints in their order.

    Raises:
        InputError: A run has no such weights, or holds a checkpoint of another.
    """
    runs = [run for setting in settings for run in setting.runs]
    kept = {run.path: _snapshots(run) for run in runs}
    if not all(kept.values()):
        return False, {
            run.path: [_moment(which, stored(run, weights, which)) for which in ("best", "final")] for run in runs
        }
    series = {}
    for run in runs:
        found = [_snapshot(run, file, weights) for _, file in sorted(kept[run.path].items())]
        series[run.path] = [moment for moment in found if weights in ("reported", moment.stored.kind)]
        if not series[run.path]:
            raise InputError(
                f"{run.path} kept no snapshot of {weights} weights: no average had begun, or the snapshots are from "
                f"before at-smooth kept it. Choose -O weights=reported."
            )
    return True, series


def _snapshot(run: Run, file: Path, weights: Weights) -> Moment:
    found = stored_weights(file, "raw" if weights == "raw" else "reported")
    run.refuse_other(file, found.content)
    return _moment(f"epoch {found.content['row']['epoch']}", found)


def _moment(name: str, found: Stored) -> Moment:
    return Moment(name, int(found.content["row"]["epoch"]), found)


def _snapshots(run: Run) -> dict[int, Path]:
    files = {file: re.fullmatch(r"epoch-(\d+)\.pt", file.name) for file in run.path.glob("checkpoints/epoch-*.pt")}
    return {int(match.group(1)): file for file, match in files.items() if match}


def common_test_part(settings: Sequence[Setting]) -> Part:
    """The test images of all runs, which must be the same.

    Raises:
        InputError: They are not, or there are none.
    """
    first: tuple[Run, Part] | None = None
    loaded: dict[str, Part] = {}
    for run in (run for setting in settings for run in setting.runs):
        recipe = run.recipe
        key = repr((recipe.dataset, sorted(recipe.dataset_options.items()), recipe.data_dir))
        if key not in loaded:
            images = recipe.plugin("dataset").load(recipe.data_dir)
            loaded[key] = Part(images.test, images.test_labels)
        part = loaded[key]
        first = first or (run, part)
        if part is not first[1] and not all(
            one.shape == other.shape and torch.equal(one, other) for one, other in zip(part, first[1], strict=True)
        ):
            raise InputError(
                f"{first[0].path} and {run.path} are of different data ({first[0].recipe.dataset} and "
                f"{recipe.dataset}, or other test images). Analyse them apart."
            )
    if first is None or first[1].n == 0:
        raise InputError("the data set has no test images to look at.")
    return first[1]


def common_threat(settings: Sequence[Setting]) -> Threat:
    """The threat that all runs were trained against.

    Raises:
        InputError: There are several.
    """
    threats = {run.recipe.threat: run for setting in settings for run in setting.runs}
    if len(threats) > 1:
        (one, its), (other, others), *_ = threats.items()
        raise InputError(f"{its.path} is for {one}, {others.path} for {other}. Analyse them apart.")
    return next(iter(threats))


def in_batches(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """A function of images and labels that gives one row an image, on some images at a time."""
    pairs = zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
    return torch.cat([function(*pair) for pair in pairs])


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(N, C, H, W) to (N, K)."""
    return torch.cat([model(batch) for batch in torch.split(images, _BATCH)])


@dataclass(frozen=True)
class Summary:
    """Several values of one thing, as over seeds."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Mean and standard deviation; one value has none."""
        return cls(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    def columns(self, name: str) -> dict[str, Any]:
        """Mean and standard deviation, for a table's row."""
        return {name: self.mean, f"{name}_sd": self.sd}


def draw_band(
    axes: Axes,
    positions: Sequence[float],
    values: Sequence[Summary],
    style: Style,
    label: str,
    every: int | tuple[float, float] = 1,
) -> None:
    """A line through means, and a band of one standard deviation around it where there are several values.

    Args:
        axes: Where.
        positions: Along the x axis.
        values: One a position.
        style: The setting's.
        label: The setting's.
        every: Points between markers; or where the first is and the gap after it, as shares of the panel's diagonal.
    """
    means = np.array([value.mean for value in values])
    spread = np.array([value.sd or 0.0 for value in values])
    axes.plot(positions, means, linestyle=style.line, marker=style.marker, color=style.colour, markevery=every,
              label=wrapped(label))  # fmt: skip
    if spread.any():
        axes.fill_between(positions, means - spread, means + spread, color=style.colour, alpha=0.18, linewidth=0)


def draw_over_epochs(
    axes: Axes, values: dict[str, dict[int, Summary]], styles: dict[str, Style], rows: Sequence[dict[str, Any]]
) -> None:
    """A line a setting over epochs, hollow where a setting that smooths its weights had no average yet.

    Args:
        axes: Where.
        values: By setting, then by epoch.
        styles: By setting.
        rows: The table behind them: ``setting``, ``epoch`` and ``weights`` of each point.
    """
    smoothing = {row["setting"] for row in rows if row["weights"] == "smoothed"}
    for label, row in values.items():
        draw_band(axes, list(row), list(row.values()), styles[label], label)
        raw = {each["epoch"] for each in rows if each["setting"] == label and each["weights"] == "raw"}
        points = [(epoch, value.mean) for epoch, value in row.items() if label in smoothing and epoch in raw]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=styles[label].marker, color="white",
                      markeredgecolor=styles[label].colour)  # fmt: skip
    if any(line.get_linestyle() == "None" for line in axes.lines):
        axes.plot([], [], linestyle="none", marker="o", color="white", markeredgecolor="black",
                  label="raw weights, before there is an average")  # fmt: skip


def draw_steps(axes: Axes, values: dict[str, dict[str, Summary]], styles: dict[str, Style]) -> None:
    """Means at a few named moments, a line a setting, side by side so that no bar of deviation hides another.

    Args:
        axes: Where.
        values: By setting, then by moment, in order.
        styles: By setting.
    """
    names = list(next(iter(values.values())))
    for number, (label, row) in enumerate(values.items()):
        shift = 0.04 * (number - (len(values) - 1) / 2)
        means, spread = [each.mean for each in row.values()], [each.sd or 0.0 for each in row.values()]
        style = styles[label]
        axes.errorbar([place + shift for place in range(len(names))], means, yerr=spread if any(spread) else None,
                      color=style.colour, marker=style.marker, linestyle=style.line, elinewidth=0.8, capsize=1.5,
                      label=wrapped(label))  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.35, len(names) - 0.65)


def draw_heading(axes: Axes, text: str) -> None:
    """A title at the left of a row of panels; it may be wider than the first, which it does not push aside."""
    axes.set_title(" " if text else "", loc="left")  # keeps the height free
    axes.annotate(plain(text), (0, 1), (0, 4), "axes fraction", "offset points", va="bottom").set_in_layout(False)


def wrapped(label: str, characters: int = 34) -> str:
    """A label on as many lines as it needs."""
    return textwrap.fill(plain(label), characters, break_long_words=False, break_on_hyphens=False)


def grid(count: int, most: int) -> tuple[int, int]:
    """Rows and columns for panels: evenly filled rows of at most so many."""
    rows = math.ceil(count / most)
    return rows, math.ceil(count / rows)


def first_runs(settings: Sequence[Setting]) -> list[tuple[str, Run]]:
    """One run for each setting, the first: for figures that show single images or points."""
    return [(setting.label, setting.runs[0]) for setting in settings]
