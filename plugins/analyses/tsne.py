"""The features of clean and of attacked images in the plane (the paper's Figures 5 and A9)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from at_smooth import InputError, Study
from at_smooth.analysis import Setting
from at_smooth.style import PALETTE, legend_above, new_figure
from at_smooth_plugins.analyses.common import (
    Examination,
    common_test_part,
    grid,
    logits_of,
    over_examples,
    panels_of,
    wrapped,
)

_COLOURS = [PALETTE[name] for name in ("orange", "blue", "green", "purple", "black", "vermillion", "sky", "grey")]


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer gets, (N, D); the logits where there is no such layer.

    Args:
        model: From images to logits (N, K).
        images: (N, C, H, W).
    """
    classes = logits_of(model, images[:1]).shape[1]
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]
    if not heads:
        return logits_of(model, images)
    kept: list[Tensor] = []
    hook = heads[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].flatten(1)))
    try:
        logits_of(model, images)
    finally:
        hook.remove()
    return torch.cat(kept)


class FeatureMap(Examination):
    """t-SNE of the features of three classes: dots are clean images, stars the same under PGD-20.

    A panel a setting (its first run); the plane has no units, and distances between far groups mean little. The table
    has the silhouette too, which is taken in the feature space itself: how much nearer an image is to its own class.
    """

    classes: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, max_length=8, description="which classes")
    n_examples: int = Field(default=210, ge=3, description="at most so many test images of those classes")
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")
    perplexity: float = Field(default=30.0, gt=1, description="how many neighbours t-SNE looks at, about")

    def draw(self, settings: list[Setting]) -> Study:
        """A panel a setting."""
        there = sorted(set(common_test_part(settings).labels.tolist()))
        missing = [each for each in self.classes if each not in there]
        if missing:
            raise InputError(f"there is no test image of class {missing[0]}. Classes: {', '.join(map(str, there))}.")
        clean, labels = self.examples(settings, self.classes)
        places: list[dict[str, Any]] = []
        separations = []
        chosen = over_examples(settings)
        for label, run in chosen:
            model = self.model(run)
            attacked = self.perturbed(model, clean, labels, run.recipe.threat, self.steps)
            both = torch.cat([clean, attacked])
            features = features_of(model, both).double().cpu().numpy()
            predicted = logits_of(model, both).argmax(1).tolist()
            kinds = ["clean"] * len(clean) + ["perturbed"] * len(attacked)
            for (x, y), kind, true, guess in zip(
                self._embedded(features), kinds, labels.tolist() * 2, predicted, strict=True
            ):
                places.append({"setting": label, "images": kind, "class": true, "predicted": guess,
                               "x": float(x), "y": float(y)})  # fmt: skip
            for kind, part in (("clean", features[: len(clean)]), ("perturbed", features[len(clean) :])):
                separations.append({"setting": label, "images": kind, "silhouette": _silhouette(part, labels)})
        figure = self._figure([label for label, _ in chosen], places)
        return Study(figure, {"points": places, "silhouette": separations})

    def _embedded(self, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(N, D) to (N, 2)."""
        from sklearn.manifold import TSNE

        perplexity = min(self.perplexity, (len(features) - 1) / 3)
        found: np.ndarray[Any, Any] = TSNE(
            perplexity=perplexity, init="pca", learning_rate="auto", random_state=self.seed
        ).fit_transform(features.astype(np.float32))
        return found

    def _figure(self, names: list[str], places: list[dict[str, Any]]) -> Any:
        rows, columns = grid(len(names), 2 if self.width == "column" else 3)
        figure = new_figure(self.inches, rows * min(self.inches / columns, 2.4) + 0.45)
        panels = list(panels_of(figure.subplots(rows, columns, squeeze=False)))
        for name, axes in zip(names, panels, strict=False):
            for number, each in enumerate(self.classes):
                for kind, marker, size, alpha in (("clean", "o", 6, 0.4), ("perturbed", "*", 13, 0.8)):
                    wanted = (name, each, kind)
                    points = [row for row in places if (row["setting"], row["class"], row["images"]) == wanted]
                    axes.scatter([row["x"] for row in points], [row["y"] for row in points], s=size, marker=marker,
                                 color=_COLOURS[number], alpha=alpha, linewidths=0,
                                 label=f"class {each}, {kind}")  # fmt: skip
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.set_title(wrapped(name, 26), loc="left")
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("t-SNE 1 (no unit)", fontsize="medium")
        figure.supylabel("t-SNE 2 (no unit)", fontsize="medium")
        legend_above(figure, columns=min(len(self.classes), 3))
        return figure


def _silhouette(features: np.ndarray[Any, Any], labels: Tensor) -> float | None:
    """From -1 to 1, the larger the further the classes are apart; None for a single class."""
    from sklearn.metrics import silhouette_score

    classes = labels.cpu().numpy()
    distinct = len(set(classes.tolist()))
    return float(silhouette_score(features, classes)) if 1 < distinct < len(classes) else None
