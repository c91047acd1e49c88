"""Accuracy under random noise, which no sound attack may be weaker than."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from at_smooth import Evaluator, Task


class Noise(Evaluator):
    """The worst of some draws of random noise of the full radius: signs times eps in Linf, a direction in L2."""

    draws: int = Field(default=10, ge=1, description="how many draws on what still stands")

    def stages(self, task: Task) -> list[str]:
        """A stage a draw."""
        return [f"draw {number}" for number in range(1, self.draws + 1)]

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """Noise on the sphere of radius eps."""
        noise = torch.randn_like(images)
        lengths = noise.abs() if task.threat.norm == "Linf" else noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return (images + task.threat.eps * noise / lengths).clamp(0, 1)
