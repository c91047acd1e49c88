"""TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from at_smooth import AttackSpec, Method


class TRADES(Method):
    """min L(f(x), y) + beta max KL(f(x + d), f(x)): Eq. 5, with the inner maximisation of Eq. 7.

    As in TRADES' own code, the divergence is from the prediction on the clean images, KL(f(x) || f(x + d)).
    """

    beta: float = Field(default=6.0, ge=0, description="weight of the divergence; the paper does not say, 6 is TRADES'")

    def attack(self, wanted: AttackSpec) -> AttackSpec:
        """The wanted attack, maximising the divergence."""
        return wanted.maximising("kl")

    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy on the clean images, and the divergence."""
        logits_clean, logits = forward_both(model, clean, perturbed)
        divergence = F.kl_div(
            F.log_softmax(logits, 1), F.log_softmax(logits_clean, 1), reduction="batchmean", log_target=True
        )
        return F.cross_entropy(logits_clean, targets) + self.beta * divergence, logits


def forward_both(model: nn.Module, clean: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits on the clean and on the perturbed images, float32, by two passes, each with its own BatchNorm statistics.

    Args:
        model: The student.
        clean: (N, C, H, W) in [0, 1].
        perturbed: Likewise.

    Returns:
        Two tensors (N, K).
    """
    return model(clean).float(), model(perturbed).float()
