"""Standard accuracy."""

from __future__ import annotations

from torch import Tensor

from at_smooth import Evaluator, Task, Threat


class Clean(Evaluator):
    """Accuracy on the images as they are (SA)."""

    def check(self, threat: Threat, num_classes: int) -> None:
        """Nothing to refuse: it needs no threat."""

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """The images themselves."""
        return images
