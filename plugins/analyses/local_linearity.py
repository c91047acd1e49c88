"""How linear the loss is around an image (the paper's Figure A11 and Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from at_smooth import Study, Threat
from at_smooth.analysis import Setting
from at_smooth.runtime import fenced_randomness
from at_smooth.style import legend_above, new_figure, styles_of
from at_smooth_plugins.analyses.common import (
    Examination,
    Summary,
    common_threat,
    draw_over_epochs,
    draw_steps,
    in_batches,
    moments,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example: logits (N, K) and classes (N,) to (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def local_linearity(
    model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, loss: Loss = cross_entropies
) -> Tensor:
    """Eq. 3 before the expectation: cos(grad L(f(x), y), grad L(f(x + noise), y)), gradients with respect to x.

    Args:
        model: From images to logits (N, K).
        images: x, (N, C, H, W).
        labels: y, (N,).
        noise: (N, C, H, W).
        loss: From logits (N, K) and labels (N,) to one loss an example, (N,).

    Returns:
        Cosines in [-1, 1], (N,), float64; NaN where a gradient is 0 and has no direction.
    """
    here = _input_gradients(model, images, labels, loss)
    there = _input_gradients(model, images + noise, labels, loss)
    cosines: Tensor = (here * there).sum(1) / (here.norm(dim=1) * there.norm(dim=1))
    return cosines


def _input_gradients(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """(N, C * H * W); in double precision, since the squares of a confident model's tiny gradients vanish in single."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        [gradients] = torch.autograd.grad(loss(model(images), labels).sum(), images)
    return gradients.flatten(1).double()


def uniform_noise(images: Tensor, threat: Threat) -> Tensor:
    """A uniform draw from the threat's ball for each image, (N, C, H, W): [-eps, eps]^d in Linf."""
    if threat.norm == "Linf":
        return torch.empty_like(images).uniform_(-threat.eps, threat.eps)
    direction = F.normalize(torch.randn_like(images).flatten(1))
    length = threat.eps * torch.rand(len(images), 1, device=images.device) ** (1 / direction.shape[1])
    return (length * direction).view_as(images)


class LocalLinearity(Examination):
    """Local linearity over checkpoints: the expected cosine of the loss's gradients at x and at x + uniform noise.

    Over the epochs where every run kept snapshots, else at the best and at the final checkpoint. Eq. 3, after
    Andriushchenko and Flammarion (NeurIPS 2020). The loss is the cross-entropy, the noise uniform in the threat's ball.
    """

    n_examples: int = Field(default=700, ge=1, description="at most so many test images, classes in proportion")
    draws: int = Field(default=5, ge=1, description="draws of noise for each image")

    def draw(self, settings: list[Setting]) -> Study:
        """A line a setting."""
        threat = common_threat(settings)
        images, labels = self.examples(settings)
        over_epochs, series = moments(settings, self.weights)
        rows = []
        for setting in settings:
            for run in setting.runs:
                for moment in series[run.path]:
                    model = self.place(moment.stored)
                    cosines = self._cosines(model, images, labels, threat)
                    rows.append(
                        {
                            "setting": setting.label,
                            "run": str(run.path),
                            "checkpoint": moment.name,
                            "epoch": moment.epoch,
                            "weights": moment.stored.kind,
                            "local_linearity": float(cosines.nanmean()),
                            "without_gradient": int(cosines.isnan().sum()),
                        }
                    )
        figure = new_figure(self.inches, 2.5)
        axes = figure.add_subplot()
        styles = styles_of(setting.label for setting in settings)
        key = "epoch" if over_epochs else "checkpoint"
        values = {setting.label: _by(key, setting.label, rows) for setting in settings}
        if over_epochs:
            draw_over_epochs(axes, values, styles, rows)
        else:
            draw_steps(axes, values, styles)
        axes.set(xlabel="epoch" if over_epochs else "checkpoint", ylabel="local linearity (cosine)")
        legend_above(figure)
        return Study(figure, {"local-linearity": rows})

    def _cosines(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        """(draws * N,), from the same noise for every model."""
        with fenced_randomness(self.seed, "noise"):
            draws = [
                in_batches(lambda x, y: local_linearity(model, x, y, uniform_noise(x, threat)), images, labels)
                for _ in range(self.draws)
            ]
        return torch.cat(draws)


def _by(key: str, label: str, rows: list[dict[str, Any]]) -> dict[Any, Summary]:
    """The mean over seeds of a setting's local linearity at each checkpoint."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["setting"] == label:
            found.setdefault(row[key], []).append(row["local_linearity"])
    return {place: Summary.of(values) for place, values in found.items()}
