"""Standard training: no attack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from at_smooth import AttackSpec, Method


class Standard(Method):
    """Clean training, min L(f(x), y): the standard-trained self-teacher."""

    def attack(self, wanted: AttackSpec) -> AttackSpec | None:
        """Nothing is attacked."""
        return None

    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy on the clean images."""
        logits = model(clean)
        return F.cross_entropy(logits, targets), logits
