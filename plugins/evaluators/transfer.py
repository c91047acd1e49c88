"""Accuracy under an attack that was made on another model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from at_smooth import PGD, Adversary, Evaluator, Task, Threat, load_model


class Transfer(Evaluator):
    """PGD on another run's model, judged on this one (appendix A1.5)."""

    source: Path = Field(description="run directory or checkpoint of the model that is attacked")
    steps: int = Field(default=20, ge=1, description="gradient steps")

    _model: nn.Module = PrivateAttr()

    def check(self, threat: Threat, num_classes: int) -> None:
        """Load the source."""
        super().check(threat, num_classes)
        self._model = load_model(self.source).requires_grad_(False)

    def fingerprint(self) -> str:
        """A digest of the source's weights."""
        digest = hashlib.sha256()
        for tensor in self._model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """PGD of torchattacks, on the source."""
        spec = PGD(threat=task.threat, steps=self.steps, mode="eval")
        return Adversary(self._model.to(images.device), spec)(images, labels)
