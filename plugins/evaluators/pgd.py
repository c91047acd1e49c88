"""Accuracy under gradient attacks: PGD in one or many restarts, untargeted or targeted, and FGSM."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from at_smooth import PGD, Adversary, AttackSpec, Evaluator, OptionalPixels, Task, Threat


class ProjectedGradient(Evaluator):
    """PGD on the cross-entropy (Madry et al., ICLR 2018); an example stands if it stands in every restart.

    Targeted, it aims at the most likely wrong classes in turn, as AutoAttack's targeted attacks do.
    """

    steps: int = Field(default=20, ge=1, description="gradient steps (the paper's test attack has 20)")
    step_size: OptionalPixels = Field(
        default=None, gt=0, description="length of a step; default eps/4 in Linf, eps*15/128 in L2"
    )
    random_start: bool = Field(default=True, description="start at a random point of the ball")
    restarts: int = Field(default=1, ge=1, description="how often it starts again on what still stands")
    targeted: bool = Field(default=False, description="aim at wrong classes, one after the other")
    target_classes: int = Field(default=9, ge=1, description="how many, the most likely first, where targeted")

    def check(self, threat: Threat, num_classes: int) -> None:
        """Refuse a step that cannot be meant."""
        super().check(threat, num_classes)
        self._spec(threat)

    def stages(self, task: Task) -> list[str]:
        """A stage a restart, and a target."""
        targets = range(1, min(self.target_classes, task.num_classes - 1) + 1) if self.targeted else [0]
        return [_stage(restart, target) for restart in range(1, self.restarts + 1) for target in targets]

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """PGD of torchattacks."""
        if self.targeted:
            labels = _likely_class(task, images, labels, rank=int(stage.rpartition(" ")[2]))
        return Adversary(task.model, self._spec(task.threat), targeted=self.targeted)(images, labels)

    def _spec(self, threat: Threat) -> AttackSpec:
        options = {"steps": self.steps, "step_size": self.step_size, "random_start": self.random_start, "mode": "eval"}
        return AttackSpec.parse("pgd", threat, options)


class FastGradient(Evaluator):
    """FGSM (Goodfellow et al., ICLR 2015): one step of length eps, from the image itself."""

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """One step of torchattacks' PGD."""
        spec = PGD(threat=task.threat, steps=1, step_size=task.threat.eps, random_start=False, mode="eval")
        return Adversary(task.model, spec)(images, labels)


def _stage(restart: int, target: int) -> str:
    return f"restart {restart}, target {target}" if target else f"restart {restart}"


def _likely_class(task: Task, images: Tensor, labels: Tensor, rank: int) -> Tensor:
    """The wrong class with the rank-th largest logit, (N,)."""
    with torch.no_grad():
        logits: Tensor = task.model(images).clone()  # which may be the images' own memory
    logits[torch.arange(len(labels)), labels] = float("-inf")
    return logits.argsort(1, descending=True)[:, rank - 1]
