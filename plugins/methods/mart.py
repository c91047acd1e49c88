"""MART (Wang et al., ICLR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from at_smooth import Method
from at_smooth_plugins.methods.trades import forward_both


class MART(Method):
    """BCE(f(x + d), y) + beta KL(f(x) || f(x + d)) (1 - p_y(x)): misclassification-aware adversarial training.

    BCE is the boosted cross-entropy of MART's Eq. 8, -log p_y(x + d) - log(1 - max_{k != y} p_k(x + d)); with soft
    targets its first part is the cross-entropy with them, and y the class they favour.
    """

    beta: float = Field(default=5.0, ge=0, description="weight of the divergence; 5 is MART's")

    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """MART's Eq. 11."""
        logits_clean, logits = forward_both(model, clean, perturbed)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        log_p_clean, log_p = F.log_softmax(logits_clean, 1), F.log_softmax(logits, 1)
        true = F.one_hot(labels, logits.shape[1]).bool()
        rival = log_p.exp().masked_fill(true, 0).amax(1)
        boosted = F.cross_entropy(logits, targets) - torch.log1p(-rival.clamp(max=1 - 1e-6)).mean()
        divergence = F.kl_div(log_p, log_p_clean, reduction="none", log_target=True).sum(1)
        return boosted + self.beta * (divergence * (1 - log_p_clean[true].exp())).mean(), logits
