"""Label smoothing (Szegedy et al., CVPR 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from at_smooth import Regularizer


def smoothed_labels(labels: Tensor, num_classes: int, alpha: float) -> Tensor:
    """Mix one-hot labels with the uniform distribution, (1 - alpha) onehot(y) + alpha / K.

    Args:
        labels: (N,) int64.
        num_classes: K.
        alpha: In [0, 1].

    Returns:
        Probabilities, (N, K).
    """
    return (1 - alpha) * F.one_hot(labels, num_classes).float() + alpha / num_classes


class LabelSmoothing(Regularizer):
    """Naive label smoothing (Table 6); the attack still maximises the loss on the hard labels."""

    alpha: float = Field(default=0.1, ge=0, le=1, description="share of the uniform distribution in the targets")

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """Probabilities (N, K)."""
        return smoothed_labels(labels, num_classes, self.alpha)
