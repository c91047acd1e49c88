"""Adversarial training (Madry et al., ICLR 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from at_smooth import Method


class AdversarialTraining(Method):
    """Adversarial training, min max L(f(x + d), y): Eq. 4 of the paper."""

    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy on the perturbed images."""
        logits = model(perturbed)
        return F.cross_entropy(logits, targets), logits
