"""No smoothing of the logits."""

from __future__ import annotations

from at_smooth import Regularizer


class CrossEntropy(Regularizer):
    """The method's own loss on the hard labels, and nothing else: the paper's baseline."""
