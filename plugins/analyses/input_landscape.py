"""The loss around an image (the paper's Figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import Field
from torch import Tensor, nn

from at_smooth import OptionalPixels, Run, Study, Threat
from at_smooth.analysis import Setting
from at_smooth.runtime import fenced_randomness
from at_smooth.style import new_figure
from at_smooth_plugins.analyses.common import Examination, common_threat, draw_heading, over_examples

_Array = np.ndarray[Any, Any]
_Grids = dict[tuple[str, int], _Array]  # by setting and image


def directions_of(model: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """r1, the sign of the loss's gradient, and r2 from Rademacher(0.5), both of the image's shape (C, H, W)."""
    with torch.enable_grad():
        at = image[None].detach().requires_grad_()
        [gradient] = torch.autograd.grad(F.cross_entropy(model(at), label[None]), at)
    return gradient[0].sign(), torch.randint(0, 2, image.shape, device=image.device) * 2.0 - 1


@torch.no_grad()
def landscape(model: nn.Module, image: Tensor, label: Tensor, r1: Tensor, r2: Tensor, offsets: Tensor) -> Tensor:
    """The losses z = loss(image + x r1 + y r2), (len(offsets), len(offsets)): a row a y, a column an x.

    Pixels may leave [0, 1]: cut off, they would draw creases that the model does not have.
    """
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    moved = image + x.flatten()[:, None, None, None] * r1 + y.flatten()[:, None, None, None] * r2
    losses = [
        F.cross_entropy(model(batch), label.expand(len(batch)), reduction="none") for batch in torch.split(moved, 256)
    ]
    return torch.cat(losses).view(len(offsets), len(offsets))


class InputLandscape(Examination):
    """The loss in a plane through an image: r1 is the sign of its gradient, r2 a random direction of signs.

    A row a setting (its first run), a column an image, with one scale of colours for all; the dashed line is where the
    plane leaves the threat's ball.
    """

    n_examples: int = Field(default=3, ge=1, le=8, description="test images, drawn by the seed")
    points: int = Field(default=41, ge=3, description="points along each side; made odd, so that the image is one")
    reach: OptionalPixels = Field(
        default=None, gt=0, description="offset of each pixel at the edge; default: twice what the threat allows"
    )

    def draw(self, settings: list[Setting]) -> Study:
        """A grid of panels."""
        threat = common_threat(settings)
        images, labels = self.examples(settings)
        reach = self.reach or 2 * _largest_offset(threat, images[0])
        half = self.points // 2
        offsets = torch.arange(-half, half + 1, device=images.device) * (reach / half)
        chosen = over_examples(settings)
        losses: _Grids = {}
        lengths: _Grids = {}
        for label, run in chosen:
            model = self.model(run)
            for number, (image, target) in enumerate(zip(images, labels, strict=True)):
                with fenced_randomness(self.seed, f"image {number}"):
                    r1, r2 = directions_of(model, image, target)
                losses[label, number] = landscape(model, image, target, r1, r2, offsets).cpu().numpy()
                lengths[label, number] = _lengths(threat, r1, r2, offsets).cpu().numpy()
        places = offsets.cpu().numpy()
        figure = self._figure(chosen, losses, lengths, places, threat, images, labels)
        return Study(figure, {"input-landscape": _rows(losses, lengths, places, labels)})

    def _figure(
        self, chosen: list[tuple[str, Run]], losses: _Grids, lengths: _Grids, places: _Array, threat: Threat,
        images: Tensor, labels: Tensor,
    ) -> Figure:  # fmt: skip
        rows, columns = len(chosen), len(labels)
        side = min((self.inches - 1.0) / columns, 2.0)
        figure = new_figure(self.inches, rows * (side + 0.22) + 0.5)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        levels = np.linspace(0, max(float(each.max()) for each in losses.values()), 25)
        step = min(_largest_offset(threat, images[0]), float(places[-1]))
        for row, (label, _) in enumerate(chosen):
            for column, axes in enumerate(panels[row]):
                filled = axes.contourf(places, places, losses[label, column], levels=levels, cmap="cividis")
                axes.contour(places, places, lengths[label, column], levels=[threat.eps], colors="white",
                             linestyles="--", linewidths=0.7)  # fmt: skip
                axes.plot(0, 0, marker="+", color="white", markersize=4, markeredgewidth=0.7)
                axes.text(0.05, 0.05, f"class {int(labels[column])}", color="white", transform=axes.transAxes,
                          fontsize="small")  # fmt: skip
                axes.set(aspect="equal", xticks=[-step, 0, step], xticklabels=["\N{MINUS SIGN}a", "0", "a"],
                         yticks=[-step, 0, step], yticklabels=["\N{MINUS SIGN}a", "0", "a"])  # fmt: skip
                axes.spines[:].set_visible(False)
            draw_heading(panels[row, 0], label)
            panels[row, 0].set_ylabel("$y$")
        for axes in panels[-1]:
            axes.set_xlabel("$x$")
        figure.supxlabel(f"image + $x\\,r_1$ + $y\\,r_2$; a = {step:.3g} (pixels in [0, 1])", fontsize="medium")
        figure.colorbar(filled, ax=panels, label="loss (nats)", aspect=30, ticks=MaxNLocator(6))
        return figure


def _largest_offset(threat: Threat, image: Tensor) -> float:
    """By how much every pixel may move at once within the threat."""
    return threat.eps if threat.norm == "Linf" else float(threat.eps / image.numel() ** 0.5)


def _lengths(threat: Threat, r1: Tensor, r2: Tensor, offsets: Tensor) -> Tensor:
    """How long x r1 + y r2 is in the threat's norm, for every x and y."""
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    if threat.norm == "Linf":
        return x.abs() + y.abs()  # some pixel has both signs alike, some has them opposed
    d, inner = r1.numel(), float((r1 * r2).sum())
    return (x**2 * float((r1**2).sum()) + y**2 * d + 2 * x * y * inner).clamp_min(0).sqrt()


def _rows(losses: _Grids, lengths: _Grids, places: _Array, labels: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "setting": label,
            "image": number,
            "class": int(labels[number]),
            "x": float(x),
            "y": float(y),
            "length": float(lengths[label, number][j, i]),
            "loss": float(table[j, i]),
        }
        for (label, number), table in losses.items()
        for j, y in enumerate(places)
        for i, x in enumerate(places)
    ]
