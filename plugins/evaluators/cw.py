"""Carlini and Wagner's L2 attack, by AdverTorch."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from at_smooth import Evaluator, Outcome, Pixels, Task, Threat, format_pixels


class CarliniWagner(Evaluator):
    """AdverTorch's ``CarliniWagnerL2Attack`` (Carlini and Wagner, S&P 2017) in the paper's setting (A2.2).

    It has no radius: it looks for the nearest wrong image, so its accuracy does not compare with PGD's. The success
    rate among the images that were right, the median L2 length of successes and the accuracy within L2 budgets say
    more.
    """

    bounded: ClassVar[bool] = False

    search_steps: int = Field(default=1, ge=1, description="binary search steps for c")
    c: float = Field(default=0.1, gt=0, description="first weight of the misclassification")
    iterations: int = Field(default=100, ge=1, description="steps of Adam for each c")
    lr: float = Field(default=0.01, gt=0, description="learning rate of Adam")
    confidence: float = Field(default=0.0, ge=0, description="by how much the wrong logit must lead")
    abort_early: bool = Field(
        default=False, description="stop a batch whose loss no longer falls; results then depend on the batch size"
    )
    budgets: tuple[Pixels, ...] = Field(
        default=(0.25, 128 / 255, 1.0, 2.0), description="L2 lengths for which an accuracy is reported"
    )

    def check(self, threat: Threat, num_classes: int) -> None:
        """Nothing to refuse: it needs no radius."""

    def stages(self, task: Task) -> list[str]:
        """What is wrong already needs no attack."""
        return ["clean", "cw"]

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """What the library returns: the nearest success, or the image itself."""
        if stage == "clean":
            return images
        _mend_advertorch()
        from advertorch.attacks import CarliniWagnerL2Attack

        attack = CarliniWagnerL2Attack(
            task.model,
            task.num_classes,
            confidence=self.confidence,
            learning_rate=self.lr,
            binary_search_steps=self.search_steps,
            max_iterations=self.iterations,
            abort_early=self.abort_early,
            initial_const=self.c,
        )
        perturbed: Tensor = attack.perturb(images, labels)
        return perturbed

    def figures(self, task: Task, outcome: Outcome) -> dict[str, Any]:
        """Success rate (percent), median L2 of successes, accuracy (percent) within each L2 budget."""
        attacked, broken = outcome.broken_by != 0, outcome.broken_by == 1
        return {
            "success_rate": 100 * broken.sum().item() / max(1, attacked.sum().item()),
            "median_l2": outcome.distances[broken].quantile(0.5).item() if broken.any() else None,
            "accuracy_within_l2": {
                str(format_pixels(budget)): 100 * (outcome.distances > budget).sum().item() / len(outcome.distances)
                for budget in self.budgets
            },
        }


def _mend_advertorch() -> None:
    """Advertorch 0.2.3 imports a function that torch no longer has."""
    gradcheck = sys.modules["torch.autograd.gradcheck"]
    if not hasattr(gradcheck, "zero_gradients"):
        gradcheck.zero_gradients = _zero_gradients  # type: ignore[attr-defined]


def _zero_gradients(tensor: Tensor) -> None:
    if tensor.grad is not None:
        tensor.grad = torch.zeros_like(tensor.grad)
