"""Teacher-free knowledge distillation (Yuan et al., CVPR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from at_smooth import Regularizer, Step, Terms


def virtual_teacher(labels: Tensor, num_classes: int, correct: float, temperature: float) -> Tensor:
    """The manually designed teacher: ``correct`` for the true class, the rest shared evenly, softened.

    As in the authors' published code, the softening is a softmax of the probabilities divided by the temperature.

    Args:
        labels: (N,) int64.
        num_classes: K, at least 2.
        correct: Probability of the true class before softening, in [0, 1].
        temperature: Above 0; large values come close to uniform.

    Returns:
        Probabilities, (N, K).
    """
    others = (1 - correct) / (num_classes - 1)
    design = torch.full((len(labels), num_classes), others, device=labels.device)
    design.scatter_(1, labels[:, None], correct)
    return F.softmax(design / temperature, dim=1)


class TeacherFree(Regularizer):
    """Tf-KD_reg (Table 6): (1 - alpha) L + alpha KL(virtual teacher, student)."""

    alpha: float = Field(default=0.1, ge=0, le=1, description="weight of the virtual teacher")
    correct: float = Field(default=0.99, ge=0, le=1, description="the teacher's probability for the true class")
    temperature: float = Field(default=20.0, gt=0, description="temperature that softens the teacher")

    def terms(self, step: Step) -> Terms:
        """The method's loss, and the divergence from the virtual teacher."""
        teacher = virtual_teacher(step.labels, step.logits.shape[1], self.correct, self.temperature)
        divergence = F.kl_div(F.log_softmax(step.logits.float(), dim=1), teacher, reduction="batchmean")
        return {"method": (1 - self.alpha) * step.loss, "tf-kd": self.alpha * divergence}
