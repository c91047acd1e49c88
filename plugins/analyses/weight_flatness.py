"""How fast the robust test loss grows as the weights are perturbed (the paper's Figure 7)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from at_smooth import Study, Threat
from at_smooth.analysis import Setting
from at_smooth.runtime import generator
from at_smooth.style import legend_above, new_figure, styles_of
from at_smooth_plugins.analyses.common import Examination, Summary, common_threat, draw_band, logits_of


def random_direction(weights: Sequence[Tensor], rng: torch.Generator, per_filter: bool) -> list[Tensor]:
    """A random direction in weight space.

    Args:
        weights: Every parameter of a model.
        rng: On the CPU, so that every device draws the same.
        per_filter: Scale the part of each filter (or row) to that filter's own norm, and leave biases and BatchNorm
            alone (Li et al., NeurIPS 2018), so that models whose weights differ in scale compare.

    Returns:
        Tensors like the weights. As one vector they have length 1, unless ``per_filter``.
    """
    draws = [torch.randn(weight.shape, generator=rng).to(weight) for weight in weights]
    if not per_filter:
        length = torch.stack([draw.norm() for draw in draws]).norm()
        return [draw / length for draw in draws]
    return [
        draw * _filter_norms(weight) / _filter_norms(draw) if weight.ndim > 1 else torch.zeros_like(weight)
        for draw, weight in zip(draws, weights, strict=True)
    ]


def _filter_norms(weight: Tensor) -> Tensor:
    """The length of each filter, shaped to divide by."""
    norms: Tensor = weight.flatten(1).norm(dim=1).clamp_min(1e-12)
    return norms.view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def moved(model: nn.Module, direction: Sequence[Tensor], distance: float) -> nn.Module:
    """A copy of the model, its parameters that far along the direction; BatchNorm's statistics stay."""
    other = copy.deepcopy(model)
    for weight, change in zip(other.parameters(), direction, strict=True):
        weight.add_(change, alpha=distance)
    return other


class WeightFlatness(Examination):
    """The robust test loss against the L2 distance of a random perturbation of the weights.

    The loss is the cross-entropy on PGD images, which are made anew for every perturbed model. The line is the
    mean over directions and seeds, the band one standard deviation over seeds; over directions where there is one seed.
    """

    n_examples: int = Field(default=100, ge=1, description="at most so many test images, classes in proportion")
    directions: int = Field(default=10, ge=1, description="random directions at each distance")
    distances: tuple[float, ...] = Field(
        default=(), description="from the trained weights; default: up to a third of the length of the weights"
    )
    filter_normalised: bool = Field(
        default=False, description="scale each filter's part of a direction to the filter's norm; distances are shares"
    )
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")

    @field_validator("distances")
    @classmethod
    def _lengths(cls, distances: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= distance < float("inf") for distance in distances):
            raise ValueError(f"distances are lengths, from 0 up, not {list(distances)}")
        return tuple(sorted(set(distances)))

    def draw(self, settings: list[Setting]) -> Study:
        """A line a setting."""
        threat = common_threat(settings)
        images, labels = self.examples(settings)
        models = {run.path: self.model(run) for setting in settings for run in setting.runs}
        distances = self.distances or self._usual_distances(list(models.values()))
        losses = {path: self._losses(model, distances, images, labels, threat) for path, model in models.items()}
        figure = new_figure(self.inches, 2.5)
        axes = figure.add_subplot()
        styles = styles_of(setting.label for setting in settings)
        for setting in settings:
            found = [losses[run.path] for run in setting.runs]
            values = [_over_seeds([each[distance] for each in found]) for distance in distances]
            draw_band(axes, distances, values, styles[setting.label], setting.label)
        measure = "share of each filter's norm" if self.filter_normalised else "L2"
        axes.set(xlabel=f"distance in weight space ({measure})", ylabel="robust test loss (nats)")
        legend_above(figure)
        rows = [
            {"setting": setting.label, "run": str(run.path), "distance": distance, "direction": number, "loss": loss}
            for setting in settings
            for run in setting.runs
            for distance in distances
            for number, loss in enumerate(losses[run.path][distance], start=1)
        ]
        return Study(figure, {"weight-flatness": rows})

    def _losses(
        self, model: nn.Module, distances: Sequence[float], images: Tensor, labels: Tensor, threat: Threat
    ) -> dict[float, list[float]]:
        """By distance, the loss in each direction; the same directions for every model of one shape."""
        weights = list(model.parameters())
        found: dict[float, list[float]] = {}
        for position, distance in enumerate(distances):
            found[distance] = []
            for number in range(self.directions if distance else 1):  # all directions are one at the centre
                rng = generator(self.seed, position * self.directions + number, "direction")
                other = moved(model, random_direction(weights, rng, self.filter_normalised), distance)
                found[distance].append(self._robust_loss(other, images, labels, threat))
        return found

    def _robust_loss(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> float:
        attacked = self.perturbed(model, images, labels, threat, self.steps)
        return float(F.cross_entropy(logits_of(model, attacked), labels))

    def _usual_distances(self, models: Sequence[nn.Module]) -> tuple[float, ...]:
        """0, and five steps up to half a filter's norm, or to a third of the length of the weights."""
        if self.filter_normalised:
            reach = 0.5
        else:
            reach = min(float(torch.stack([w.norm() for w in model.parameters()]).norm()) for model in models) / 3
        return tuple(float(f"{float(f'{reach:.2g}') * step / 5:.3g}") for step in range(6))


def _over_seeds(losses: list[list[float]]) -> Summary:
    """A run's mean over directions, and that over seeds; with one seed the directions are what varies."""
    return Summary.of(losses[0] if len(losses) == 1 else [fmean(each) for each in losses])
