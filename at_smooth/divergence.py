"""When training diverges: the test for it, the likely cause in words, and a dump to look into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.exceptions import DivergedError
from at_smooth.interfaces import Batch, Terms


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating-point tensor holds a NaN or an infinity; waits for the device."""
    floating = [each for each in tensors if each.is_floating_point() and each.numel()]
    return not floating or bool(surely_finite(floating)) or all(bool(each.isfinite().all()) for each in floating)


def surely_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether floating-point tensors hold no NaN and no infinity, a bool scalar on their device; no waiting.

    It is their squares that are summed up, the fastest reduction that there is, so that numbers beyond 1e19 look like
    infinities: False means that it is worth a look.
    """
    return torch.stack(torch._foreach_norm([each.detach() for each in tensors])).isfinite().all()


@dataclass(frozen=True)
class Scene:
    """A step in which something is not finite.

    Attributes:
        model: The student.
        epoch: Counted from 0.
        step: Of the epoch, counted from 0.
        lr: The learning rate.
        precision: ``"fp32"`` or ``"bf16"``.
        batch: The clean images.
        perturbed: What the attack made of them, (N, C, H, W).
        logits: The student's on ``perturbed``, (N, K).
        terms: The weighted terms of the loss.
    """

    model: nn.Module
    epoch: int
    step: int
    lr: float
    precision: str
    batch: Batch
    perturbed: Tensor
    logits: Tensor
    terms: Terms

    def error(self) -> DivergedError:
        """Epoch, step, what was not finite, the likely cause; and the dump."""
        worth = ", ".join(f"{name} {value.item():g}" for name, value in self.terms.items())
        where = f"at epoch {self.epoch + 1}, step {self.step + 1}"
        message = f"{self._what()} {where} (loss: {worth}). Likely cause: {self._likely_cause()}"
        return DivergedError(message, self._dump())

    def _what(self) -> str:
        if not all_finite(self.model.parameters()):
            return "the weights are not finite since the update before,"
        loss = sum(value.item() for value in self.terms.values())
        if abs(loss) < float("inf"):
            return "the gradients are not finite"
        return f"the loss is {loss}"

    def _likely_cause(self) -> str:
        if not all_finite([self.batch.clean]):
            return "images that are not finite; look at the data set's files."
        if not all_finite([self.perturbed]) and all_finite(self.model.parameters()):
            return "the attack, whose images are not finite; try other options -A, or another --attack."
        broken = [name for name, value in self.terms.items() if not all_finite([value])]
        if broken and all_finite([self.logits]):
            others = "" if len(broken) == len(self.terms) else " alone"
            return (
                f"the term '{broken[0]}'{others}: the student's logits are finite, so look at the options or the "
                f"teacher that it comes from. If these are as they should be, try a lower --lr."
            )
        rate = f"a learning rate that is too high ({self.lr:g}). Try a lower --lr."
        return rate if self.precision == "fp32" else f"{self.precision} or {rate} Or try --precision fp32."

    def _dump(self) -> dict[str, Any]:
        tensors = {
            "indices": self.batch.indices,
            "labels": self.batch.labels,
            "clean": self.batch.clean,
            "perturbed": self.perturbed,
            "logits": self.logits,
        }
        return {
            "epoch": self.epoch + 1,
            "step": self.step + 1,
            "lr": self.lr,
            "terms": {name: value.item() for name, value in self.terms.items()},
            **{name: value.detach().cpu() for name, value in tensors.items()},
            "model": _on_the_cpu(self.model),
        }


def weights_diverged(model: nn.Module, epoch: int, lr: float) -> DivergedError:
    """The weights, or the BatchNorm statistics, are not finite though the gradients were."""
    message = (
        f"the weights are not finite in epoch {epoch + 1}. Likely cause: a learning rate that is too high ({lr:g}). "
        f"Try a lower --lr."
    )
    return DivergedError(message, {"epoch": epoch + 1, "lr": lr, "model": _on_the_cpu(model)})


def average_diverged(average: nn.Module, epoch: int) -> DivergedError:
    """The averaged weights, or their BatchNorm statistics, are not finite though the student's are."""
    message = (
        f"the smoothed weights are not finite after epoch {epoch + 1}. Likely cause: weights or activations that grew "
        f"out of bounds before; try a lower --lr, or a later -S start."
    )
    return DivergedError(message, {"epoch": epoch + 1, "smoothed": _on_the_cpu(average)})


def _on_the_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
