"""The confidence penalty (Pereyra et al., 2017) as a regularizer for at-smooth."""

from pydantic import Field

from at_smooth import Regularizer, Step, Terms


class ConfidencePenalty(Regularizer):
    """L - strength * H(p), with H the mean entropy of the student's predictions on the perturbed images."""

    strength: float = Field(default=0.1, ge=0, description="weight of the entropy")

    def terms(self, step: Step) -> Terms:
        log_p = step.logits.float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return {"method": step.loss, "confidence-penalty": -self.strength * entropy}
