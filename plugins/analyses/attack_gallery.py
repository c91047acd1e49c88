"""What an attack does to images: clean, perturbed, and the difference made large."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from at_smooth import Study
from at_smooth.analysis import Setting
from at_smooth.style import new_figure
from at_smooth_plugins.analyses.common import Examination, logits_of, over_examples


class AttackGallery(Examination):
    """Test images, the same under PGD against each setting's first run, and the difference, magnified.

    Under each image stands the predicted class and its probability; a red one is wrong. In the difference grey is no
    change.
    """

    n_examples: int = Field(default=5, ge=1, le=10, description="test images, drawn by the seed")
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")

    def draw(self, settings: list[Setting]) -> Study:
        """A column an image; a row of clean images and two of attacked ones for each setting."""
        clean, labels = self.examples(settings)
        chosen = over_examples(settings)
        blocks, table = [], []
        for label, run in chosen:
            model, threat = self.model(run), run.recipe.threat
            attacked = self.perturbed(model, clean, labels, threat, self.steps)
            before, after = (logits_of(model, images).softmax(1).max(1) for images in (clean, attacked))
            change = (attacked - clean).flatten(1)
            blocks.append((label, attacked, before, after))
            table += [
                {
                    "setting": label,
                    "image": number,
                    "class": int(labels[number]),
                    "clean_prediction": int(before.indices[number]),
                    "clean_probability": float(before.values[number]),
                    "perturbed_prediction": int(after.indices[number]),
                    "perturbed_probability": float(after.values[number]),
                    "linf": float(change[number].abs().max()),
                    "l2": float(change[number].norm()),
                    "threat": str(threat),
                }
                for number in range(len(labels))
            ]
        return Study(self._figure(clean, labels, blocks), {"attack-gallery": table})

    def _figure(self, clean: Tensor, labels: Tensor, blocks: list[tuple[str, Tensor, Any, Any]]) -> Figure:
        columns, side = len(labels), (self.inches - 0.75) / len(labels)
        figure = new_figure(self.inches, len(blocks) * (3 * (side + 0.16) + 0.2) + 0.1)
        largest = max(float((attacked - clean).abs().max()) for _, attacked, _, _ in blocks)
        times = _round(0.5 / largest) if largest else 1.0
        parts = np.atleast_1d(figure.subfigures(len(blocks), 1))
        for part, (label, attacked, before, after) in zip(parts, blocks, strict=True):
            part.suptitle(label, x=0.01, ha="left", fontsize="medium")
            panels = part.subplots(3, columns, squeeze=False)
            difference = (0.5 + times * (attacked - clean)).clamp(0, 1)
            for row, (name, images, predictions) in enumerate(
                (("clean", clean, before), ("perturbed", attacked, after), (f"difference\n×{times:g}", difference, None))
            ):
                panels[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
                for column, axes in enumerate(panels[row]):
                    axes.imshow(_pixels(images[column]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                    axes.set(xticks=[], yticks=[])
                    axes.spines[:].set_visible(False)
                    if predictions is not None:
                        guess, probability = int(predictions.indices[column]), float(predictions.values[column])
                        right = guess == int(labels[column])
                        axes.set_xlabel(f"{guess} ({100 * probability:.0f} %)", labelpad=1.5, fontsize="small",
                                        color="black" if right else "#B00020",
                                        fontweight="normal" if right else "bold")  # fmt: skip
        return figure


def _round(factor: float) -> float:
    """One significant digit, downwards, so that nothing is cut off."""
    power = 10 ** np.floor(np.log10(factor))
    return float(np.floor(factor / power) * power)


def _pixels(image: Tensor) -> Any:
    """(C, H, W) as (H, W, 3), or (H, W) where there is no colour to show."""
    array = image.cpu()
    return array.permute(1, 2, 0).numpy() if len(array) == 3 else torch.mean(array, 0).numpy()
