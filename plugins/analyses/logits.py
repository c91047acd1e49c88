"""What the smoothed targets say of the correct class and of the others (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from at_smooth import CLEAN, Run, Study
from at_smooth.analysis import Setting
from at_smooth.experiment import Stored, stored_weights
from at_smooth.style import PALETTE, legend_above, new_figure
from at_smooth_plugins.analyses.common import Examination, first_runs, logits_of, wrapped
from at_smooth_plugins.regularizers.label_smoothing import smoothed_labels
from at_smooth_plugins.regularizers.tf_kd import virtual_teacher

_COLOURS = {"correct": PALETTE["blue"], "others": PALETTE["orange"]}
_NAMES = {"correct": "correct class", "others": "other classes"}
_QUANTILES = (5, 25, 50, 75, 95)


class Logits(Examination):
    """Distributions of the correct and of the other classes: two smoothings by hand, both self-teachers, the models.

    The smoothings by hand are label smoothing and the virtual teacher of Tf-KD, which are the same for every image. The
    self-teachers are those of the first run that has some. All see the images that the run's own model is attacked
    with, as in Eq. 1. Boxes are quartiles, whiskers reach from the 5th to the 95th percentile.
    """

    scale: Literal["probability", "logit"] = Field(
        default="probability", description="probabilities, or logits less their mean over the classes"
    )
    images: Literal["perturbed", "clean"] = Field(default="perturbed", description="what the models look at")
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")
    alpha: float = Field(default=0.1, ge=0, le=1, description="of label smoothing")
    correct: float = Field(default=0.99, ge=0, le=1, description="the virtual teacher's probability before softening")
    softening: float = Field(default=20.0, gt=0, description="the virtual teacher's temperature")
    temperature: float = Field(default=1.0, gt=0, description="of the self-teachers; KD takes 2 (A2.1)")

    def draw(self, settings: list[Setting]) -> Study:
        """A pair of boxes for each source, the sources below each other."""
        clean, labels = self.examples(settings)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        chosen = first_runs(settings)
        taught = next((run for _, run in chosen if any(_teachers(run))), None)
        for label, run in chosen:
            model = self.model(run)
            images = clean
            if self.images == "perturbed":
                images = self.perturbed(model, clean, labels, run.recipe.threat, self.steps)
            found[label] = self._split(logits_of(model, images), labels)
            if run is taught:
                for name, stored in _teachers(run):
                    logits = logits_of(self.place(stored), images) / self.temperature
                    found[name] = self._split(logits, labels)
        classes = logits_of(model, clean[:1]).shape[1]
        by_hand = {
            f"label smoothing ({self.alpha:g})": smoothed_labels(labels, classes, self.alpha),
            f"Tf-KD (T = {self.softening:g})": virtual_teacher(labels, classes, self.correct, self.softening),
        }
        sources = {name: self._split(values.clamp_min(1e-12).log(), labels) for name, values in by_hand.items()}
        models = {label for label, _ in chosen}
        sources |= {name: pair for name, pair in found.items() if name not in models}
        sources |= {name: pair for name, pair in found.items() if name in models}
        return Study(self._figure(sources), {"logits": _rows(sources)})

    def _split(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the correct class (N,) and of the others (N * (K - 1),)."""
        values = logits.softmax(1) if self.scale == "probability" else logits - logits.mean(1, keepdim=True)
        correct = F.one_hot(labels, logits.shape[1]).bool()
        return values[correct].cpu(), values[~correct].cpu()

    def _figure(self, sources: dict[str, tuple[Tensor, Tensor]]) -> Figure:
        figure = new_figure(self.inches, 0.75 + 0.36 * len(sources))
        axes = figure.add_subplot()
        for place, pair in enumerate(sources.values()):
            for shift, (which, values) in zip((-0.18, 0.18), zip(_COLOURS, pair, strict=True), strict=True):
                _draw_box(axes, values.numpy(), place + shift, which)
        axes.set_yticks(range(len(sources)), [wrapped(name, 18) for name in sources])
        axes.set_ylim(len(sources) - 0.5, -0.5)
        axes.grid(axis="x", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        if self.scale == "probability":
            lowest = min(float(np.percentile(values.numpy(), 5)) for pair in sources.values() for values in pair)
            axes.set(xscale="log", xlabel=f"probability on {self.images} images", xlim=(max(lowest / 2, 1e-8), 1.3))
        else:
            axes.set_xlabel(f"logit less the mean, on {self.images} images")
        legend_above(figure)
        return figure


def _draw_box(axes: Axes, values: np.ndarray[Any, Any], place: float, which: str) -> None:
    """Quartiles as a box, 5th to 95th percentile as whiskers; a target that is always the same is a diamond."""
    colour = _COLOURS[which]
    if np.ptp(values) < 1e-4 * abs(values).max():
        axes.plot(values[0], place, marker="D", color=colour, linestyle="none")
        return
    parts = axes.boxplot([values], positions=[place], widths=0.28, whis=(5, 95), showfliers=False, patch_artist=True,
                         manage_ticks=False, **_sideways())  # fmt: skip
    for artist in (*parts["whiskers"], *parts["caps"], *parts["boxes"]):
        artist.set(color=colour, linewidth=0.8)
    parts["boxes"][0].set(facecolor=colour, alpha=0.75, label=_NAMES[which])
    parts["medians"][0].set(color="black", linewidth=1)


def _sideways() -> dict[str, Any]:
    """Boxes that lie; the option has another name since matplotlib 3.10."""
    return {"orientation": "horizontal"} if "orientation" in signature(Axes.boxplot).parameters else {"vert": False}


def _teachers(run: Run) -> Iterator[tuple[str, Stored]]:
    """The self-teachers that a run keeps, those trained on clean images first."""
    found = []
    for file in sorted(run.path.glob("teachers/*/checkpoints/best.pt")):
        stored = stored_weights(file)
        recipe = stored.recipe
        attacked = recipe.plugin("method").attack(recipe.attack_spec) is not CLEAN
        found.append((attacked, "robust teacher" if attacked else "standard teacher", stored))
    for _, name, stored in sorted(found, key=lambda each: each[0]):
        yield name, stored


def _rows(sources: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    return [
        {
            "source": name,
            "classes": which,
            "n": len(values),
            "mean": float(values.double().mean()),
            **{f"p{each}": float(np.percentile(values.numpy(), each)) for each in _QUANTILES},
        }
        for name, pair in sources.items()
        for which, values in zip(_COLOURS, pair, strict=True)
    ]
