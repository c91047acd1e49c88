"""What an attack does to images: clean, perturbed, and the difference made large."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from at_smooth import Study
from at_smooth.analysis import Setting
from at_smooth.style import new_figure
from at_smooth_plugins.analyses.common import Examination, draw_heading, logits_of, over_examples


class _Predictions(NamedTuple):
    """The likeliest class of each image, and its probability."""

    probabilities: Tensor
    classes: Tensor


class _Block(NamedTuple):
    """What one setting's attack did."""

    label: str
    attacked: Tensor
    before: _Predictions
    after: _Predictions


class _Row(NamedTuple):
    """One row of the figure: images, and below each a text, which is red where it is wrong."""

    heading: str
    name: str
    images: Tensor
    texts: list[tuple[str, bool]]


class AttackGallery(Examination):
    """Test images, the same under PGD against each setting's first run, and the difference, magnified.

    Under an attacked image stands the predicted class and its probability; a red one is wrong. Under a clean one too
    where there is one setting, else its true class. In the difference grey is no change.
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
            before, after = (_Predictions(*logits_of(model, each).softmax(1).max(1)) for each in (clean, attacked))
            change = (attacked - clean).flatten(1)
            blocks.append(_Block(label, attacked, before, after))
            table += [
                {
                    "setting": label,
                    "image": number,
                    "class": int(labels[number]),
                    "clean_prediction": int(before.classes[number]),
                    "clean_probability": float(before.probabilities[number]),
                    "perturbed_prediction": int(after.classes[number]),
                    "perturbed_probability": float(after.probabilities[number]),
                    "linf": float(change[number].abs().max()),
                    "l2": float(change[number].norm()),
                    "threat": str(threat),
                }
                for number in range(len(labels))
            ]
        return Study(self._figure(clean, labels, blocks), {"attack-gallery": table})

    def _figure(self, clean: Tensor, labels: Tensor, blocks: list[_Block]) -> Figure:
        largest = max(float((block.attacked - clean).abs().max()) for block in blocks)
        times = _rounded_down(0.5 / largest) if largest else 1.0
        rows: list[_Row] = []
        for number, block in enumerate(blocks):
            if number == 0:
                alone = len(blocks) == 1
                texts = _predictions(block.before, labels) if alone else [(f"class {int(y)}", True) for y in labels]
                rows.append(_Row(block.label if alone else "", "clean", clean, texts))
            rows.append(_Row("" if len(blocks) == 1 else block.label, "perturbed", block.attacked,
                             _predictions(block.after, labels)))  # fmt: skip
            change = (0.5 + times * (block.attacked - clean)).clamp(0, 1)
            rows.append(_Row("", f"difference\n\N{MULTIPLICATION SIGN} {times:g}", change, [("", True)] * len(labels)))
        side = min((self.inches - 0.75) / len(labels), 0.9)
        height = sum(side + 0.05 + 0.18 * bool(row.heading) + 0.14 * bool(row.texts[0][0]) for row in rows)
        figure = new_figure(self.inches, height + 0.05)
        figure.set_layout_engine("constrained", hspace=0, wspace=0.01)
        panels = figure.subplots(len(rows), len(labels), squeeze=False)
        for row, line in zip(rows, panels, strict=True):
            line[0].set_ylabel(row.name, rotation=0, ha="right", va="center")
            draw_heading(line[0], row.heading)
            for axes, image, (text, right) in zip(line, row.images, row.texts, strict=True):
                axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                axes.set_xlabel(text, labelpad=1.5, fontsize="small", color="black" if right else "#B00020",
                                fontweight="normal" if right else "bold")  # fmt: skip
        return figure


def _predictions(found: _Predictions, labels: Tensor) -> list[tuple[str, bool]]:
    """What a model says, in words, and whether it is right."""
    return [
        (f"{int(guess)} ({100 * float(probability):.0f} %)", int(guess) == int(label))
        for probability, guess, label in zip(*found, labels, strict=True)
    ]


def _rounded_down(factor: float) -> float:
    """One significant digit, downwards, so that nothing is cut off."""
    power = 10 ** np.floor(np.log10(factor))
    return float(np.floor(factor / power) * power)


def _pixels(image: Tensor) -> Any:
    """(C, H, W) as (H, W, 3), or (H, W) where there is no colour to show."""
    array = image.cpu()
    return array.permute(1, 2, 0).numpy() if len(array) == 3 else torch.mean(array, 0).numpy()
