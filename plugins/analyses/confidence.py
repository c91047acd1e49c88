"""How far confidence is to be believed: reliability diagrams and the expected calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from at_smooth import Study
from at_smooth.analysis import Setting
from at_smooth.style import legend_above, new_figure, styles_of
from at_smooth_plugins.analyses.common import Examination, Summary, common_threat, logits_of, wrapped

_KINDS = ("clean", "perturbed")


def reliability(probabilities: Tensor, labels: Tensor, bins: int) -> list[dict[str, Any]]:
    """Confidence and accuracy in bins of equal width over the largest probability.

    Args:
        probabilities: (N, K).
        labels: (N,).
        bins: How many; the bin b of B holds confidences in (b/B, (b+1)/B].

    Returns:
        A row a bin that holds anything: ``low``, ``high``, ``n``, ``confidence`` and ``accuracy``, the last two means
        in [0, 1].
    """
    confidence, predicted = probabilities.double().max(1)
    right = predicted == labels
    positions = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    rows = []
    for position in range(bins):
        inside = positions == position
        if inside.any():
            rows.append(
                {
                    "low": position / bins,
                    "high": (position + 1) / bins,
                    "n": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].double().mean()),
                }
            )
    return rows


def expected_calibration_error(rows: list[dict[str, Any]]) -> float:
    """The mean of |accuracy - confidence| over examples, by bins (Naeini et al., AAAI 2015), in [0, 1]."""
    total = sum(row["n"] for row in rows)
    return float(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total)


class Confidence(Examination):
    """Reliability diagrams on clean and on PGD images, and the expected calibration error (ECE) of each setting.

    Below the diagonal a model is overconfident, from which the paper starts (section 2.1). The diagrams pool the seeds;
    the error is a mean over them, with one standard deviation.
    """

    n_examples: int = Field(default=700, ge=1, description="at most so many test images, classes in proportion")
    bins: int = Field(default=10, ge=1, description="bins of equal width")
    fewest: int = Field(default=5, ge=1, description="examples that a bin needs to be drawn")
    steps: int = Field(default=20, ge=1, description="steps of the PGD attack")

    def draw(self, settings: list[Setting]) -> Study:
        """Two diagrams, and the errors below."""
        threat = common_threat(settings)
        clean, labels = self.examples(settings)
        found: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
        errors = []
        for setting in settings:
            for run in setting.runs:
                model = self.model(run)
                attacked = self.perturbed(model, clean, labels, threat, self.steps)
                for kind, images in zip(_KINDS, (clean, attacked), strict=True):
                    rows = reliability(logits_of(model, images).softmax(1), labels, self.bins)
                    found.setdefault((setting.label, kind), []).append(rows)
                    errors.append(
                        {
                            "setting": setting.label,
                            "run": str(run.path),
                            "images": kind,
                            "ece": expected_calibration_error(rows),
                            "confidence": _mean(rows, "confidence"),
                            "accuracy": _mean(rows, "accuracy"),
                        }
                    )
        pooled = {key: _pooled(parts) for key, parts in found.items()}
        table = [{"setting": label, "images": kind, **row} for (label, kind), rows in pooled.items() for row in rows]
        return Study(self._figure(settings, pooled, errors), {"reliability": table, "ece": errors})

    def _figure(
        self,
        settings: list[Setting],
        pooled: dict[tuple[str, str], list[dict[str, Any]]],
        errors: list[dict[str, Any]],
    ) -> Any:
        lower = 0.45 + 0.13 * len(settings)
        upper = min(self.inches / 2, 2.4)
        figure = new_figure(self.inches, upper + lower + 0.6)
        panels = figure.subplots(2, 2, sharey="row", height_ratios=[upper, lower])
        styles = styles_of(setting.label for setting in settings)
        for kind, diagram, dots in zip(_KINDS, panels[0], panels[1], strict=True):
            diagram.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=0.8)
            for place, setting in enumerate(settings):
                style = styles[setting.label]
                rows = [row for row in pooled[setting.label, kind] if row["n"] >= self.fewest]
                diagram.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], color=style.colour,
                             marker=style.marker, linestyle=style.line, label=wrapped(setting.label))  # fmt: skip
                error = Summary.of([100 * row["ece"] for row in errors if (row["setting"], row["images"]) ==
                                    (setting.label, kind)])  # fmt: skip
                dots.errorbar(error.mean, place, xerr=error.sd, color=style.colour, marker=style.marker,
                              elinewidth=0.8, capsize=1.5)  # fmt: skip
            diagram.set(title=f"{kind} images", xlabel="confidence", xlim=(0, 1), ylim=(0, 1), aspect="equal",
                        xticks=np.linspace(0, 1, 3), yticks=np.linspace(0, 1, 3))  # fmt: skip
            dots.set(xlabel="ECE (%)", ylim=(len(settings) - 0.5, -0.5), yticks=[])
            dots.set_xlim(left=0)
            dots.grid(axis="x", color="0.9", linewidth=0.5)
        panels[0, 0].set_ylabel("accuracy")
        legend_above(figure)
        return figure


def _mean(rows: list[dict[str, Any]], column: str) -> float:
    return float(np.average([row[column] for row in rows], weights=[row["n"] for row in rows]))


def _pooled(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The bins of several models as if their predictions were one model's."""
    pooled = []
    for low in sorted({row["low"] for rows in parts for row in rows}):
        here = [row for rows in parts for row in rows if row["low"] == low]
        counted = {"n": sum(row["n"] for row in here)}
        pooled.append({"low": low, "high": here[0]["high"], **counted, "confidence": _mean(here, "confidence"),
                       "accuracy": _mean(here, "accuracy")})  # fmt: skip
    return pooled
