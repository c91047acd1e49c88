"""No smoothing of the logits."""

from __future__ import annotations

from at_smooth import Regularizer, Step, Terms


class CrossEntropy(Regularizer):
    """The method's own loss on the hard labels, and nothing else: the paper's baseline."""

    def terms(self, step: Step) -> Terms:
        """The method's loss."""
        return {"method": step.loss}
