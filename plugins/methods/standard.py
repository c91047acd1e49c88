"""Standard training: no attack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from at_smooth import CLEAN, AttackSpec, Clean, Method


class Standard(Method):
    """Clean training, min L(f(x), y): the standard-trained self-teacher."""

    def attack(self, wanted: AttackSpec) -> AttackSpec | Clean:
        """Nothing is attacked."""
        return CLEAN

    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy on the clean images."""
        logits = model(clean)
        return F.cross_entropy(logits, targets), logits
