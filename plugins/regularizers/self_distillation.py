"""Learned smoothing of the logits by self-teachers (the paper's section 2.1, Eq. 1)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from at_smooth import Regularizer, Step, Teachers, Terms


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, times_t2: bool = True) -> Tensor:
    """KD of A2.1: the cross-entropy between two softened distributions.

    Args:
        student: Logits, (N, K).
        teacher: Logits, (N, K).
        temperature: T, above 0.
        times_t2: Multiply by T^2, which keeps the gradient's size as T grows (Hinton et al., 2015).

    Returns:
        A scalar.
    """
    soft = F.softmax(teacher.float() / temperature, dim=1)
    loss = F.cross_entropy(student.float() / temperature, soft)
    return loss * temperature**2 if times_t2 else loss


class BothTeachers(Regularizer):
    """KD_std&adv, Eq. 1: (1 - l1 - l2) L + l1 KD(student, robust teacher) + l2 KD(student, standard teacher).

    Both teachers see the perturbed images. A weight of 0 asks for no such teacher.
    """

    lambda_adv: float = Field(default=0.5, ge=0, le=1, description="weight of the robust-trained teacher, l1")
    lambda_std: float = Field(default=0.25, ge=0, le=1, description="weight of the standard-trained teacher, l2")
    temperature: float = Field(default=2.0, gt=0, description="temperature of the distillation")
    times_t2: bool = Field(
        default=True, description="multiply KD by T^2, as the published code does; the paper does not say"
    )
    adv_attack: str | None = Field(
        default=None, description="attack that the robust teacher is trained on; default: the run's own (Table 6)"
    )
    adv_steps: int | None = Field(
        default=None, ge=1, description="steps of that attack; default: the run's own, or the attack's (Table 6)"
    )
    adv_teacher: Path | None = Field(default=None, description="run or checkpoint to use as the robust teacher")
    std_teacher: Path | None = Field(default=None, description="run or checkpoint to use as the standard teacher")

    _adv_teacher: nn.Module | None = PrivateAttr(default=None)
    _std_teacher: nn.Module | None = PrivateAttr(default=None)

    @field_validator("adv_teacher", "std_teacher")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        try:
            return path.expanduser().absolute() if path else None  # a recipe works from any folder
        except RuntimeError:
            raise ValueError(f"{path}: there is no such user") from None

    @model_validator(mode="after")
    def _weights_leave_room(self) -> BothTeachers:
        if self.lambda_adv + self.lambda_std > 1:
            raise ValueError(
                f"lambda_adv + lambda_std is {self.lambda_adv + self.lambda_std:g}; the weights of Eq. 1 sum to at "
                f"most 1, so lower one of them"
            )
        return self

    def setup(self, teachers: Teachers) -> None:
        """Get the teachers that have a weight."""
        if self.lambda_std:
            self._std_teacher = teachers.get("standard", self.std_teacher)
        if self.lambda_adv:
            attack = {"attack": self.adv_attack, "attack_options": self.adv_steps and {"steps": self.adv_steps}}
            kind = {field: value for field, value in attack.items() if value}
            self._adv_teacher = teachers.get("at", self.adv_teacher, **kind)

    def terms(self, step: Step) -> Terms:
        """The three terms of Eq. 1."""
        return {
            "method": (1 - self.lambda_adv - self.lambda_std) * step.loss,
            "kd-adv": self.lambda_adv * self._distil(step, self._adv_teacher),
            "kd-std": self.lambda_std * self._distil(step, self._std_teacher),
        }

    def _distil(self, step: Step, teacher: nn.Module | None) -> Tensor:
        if teacher is None:
            return step.loss.new_zeros(())
        with torch.no_grad():
            logits = teacher(step.perturbed)
        return distillation_loss(step.logits, logits, self.temperature, self.times_t2)


class RobustTeacher(BothTeachers):
    """KD_adv (Table 5): the robust-trained teacher alone."""

    lambda_std: float = Field(default=0.0, ge=0, le=1, description="weight of the standard-trained teacher, l2")


class StandardTeacher(BothTeachers):
    """KD_std (Table 5): the standard-trained teacher alone."""

    lambda_adv: float = Field(default=0.0, ge=0, le=1, description="weight of the robust-trained teacher, l1")
