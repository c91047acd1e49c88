"""What training is made of: methods, regularizers and smoothers, and what they are given."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from at_smooth.attacks import AttackSpec, Clean
from at_smooth.interfaces.plugin import Plugin

#: Weighted scalars, by name; the training loss is their sum.
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Some examples, on the device.

    Attributes:
        clean: Images, (N, C, H, W) in [0, 1].
        labels: Classes, (N,) int64.
        indices: Position of each example in the training set, (N,) int64.
        whole: How many examples the batch has of which these are this rank's share; None where they are all of it.
    """

    clean: Tensor
    labels: Tensor
    indices: Tensor
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pieces(self, count: int) -> list[Batch]:
        """As many parts of nearly one size, of two examples at least, since BatchNorm needs two."""
        count = max(1, min(count, len(self) // 2))
        parts = zip(*(torch.tensor_split(each, count) for each in (self.clean, self.labels, self.indices)), strict=True)
        return [Batch(*part) for part in parts] if count > 1 else [self]


@dataclass(frozen=True)
class Step:
    """What a regularizer may look at in one training step.

    Attributes:
        clean: Images, (N, C, H, W) in [0, 1].
        perturbed: The attacked images, likewise; the clean batch itself where the method attacks nothing.
        labels: Classes, (N,).
        indices: Position of each example in the training set, (N,), for remedies that remember examples.
        logits: The student's on ``perturbed``, (N, K), with gradient.
        loss: The method's own loss on this regularizer's targets, a scalar with gradient.
        progress: 0 at the start of training, 1 at its end.
    """

    clean: Tensor
    perturbed: Tensor
    labels: Tensor
    indices: Tensor
    logits: Tensor
    loss: Tensor
    progress: float


@dataclass(frozen=True)
class Schedule:
    """The shape of a training run, for smoothers that start at a moment of it.

    Attributes:
        epochs: How many there are.
        steps_per_epoch: Updates in each.
        first_decay: How many epochs run before the learning rate first drops; None where it never drops at once.
    """

    epochs: int
    steps_per_epoch: int
    first_decay: int | None


class Teachers(Protocol):
    """Where a regularizer gets its teachers from."""

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A frozen copy of the student's architecture, trained by ``method``, in eval mode on the student's device.

        Args:
            method: Name of the method that trained it, as in ``"at"``.
            path: A run directory or checkpoint to take it from; None finds or trains one.
            **changes: Where its recipe differs from the student's otherwise, as in ``attack="fgsm"``.
        """
        ...  # pragma: no cover


class TrainingPlugin(Plugin):
    """What takes part in each step: methods, regularizers and smoothers. All that it is given is its own to change.

    Attributes:
        same_on_all_ranks: Whether what it remembers (:meth:`state`) is the same on every rank of a training, though
            each sees its own share of a batch. Where not, a training of several ranks refuses one that remembers.
    """

    same_on_all_ranks: ClassVar[bool] = False

    def state(self) -> dict[str, Any]:
        """What it remembers of the training: tensors and plain values, in dicts and lists. Teachers do not belong here.

        A plugin that keeps nothing but what it can make again, such as a table of constants, says so by ``{}``.
        """
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` gave, so that :meth:`state` gives the same again.

        Args:
            state: A copy; tensors are on the training's device, or on the CPU if they were when it was saved.
        """


class Method(TrainingPlugin):
    """Which attack to train on, and how its loss is formed."""

    def attack(self, wanted: AttackSpec) -> AttackSpec | Clean:
        """The attack to train on: the one that the user wants, a changed one, or ``CLEAN`` for clean training."""
        return wanted

    @abstractmethod
    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The method's loss.

        Args:
            model: The student, in training mode; its modes are the same afterwards.
            clean: (N, C, H, W) in [0, 1].
            perturbed: Likewise; the clean batch itself where :meth:`attack` gave ``CLEAN``.
            targets: Classes (N,), or probabilities (N, K).

        Returns:
            The loss, a scalar, and the logits on ``perturbed``, (N, K), both with gradient.
        """


class Regularizer(TrainingPlugin):
    """Smooths the logits. As it stands it changes nothing."""

    def setup(self, teachers: Teachers) -> None:
        """Called once, before training and :meth:`restore`; the place to ask for teachers."""

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """What the method's loss compares with: classes (N,), or probabilities (N, K)."""
        return labels

    def terms(self, step: Step) -> Terms:
        """The weighted terms, scalars by name, whose sum is the training loss."""
        return {"method": step.loss}


class WeightSmoother(TrainingPlugin):
    """Smooths the weights. As it stands it smooths nothing.

    Epochs count from 0 here. It sees the model alone, which is the same on all ranks.

    Attributes:
        reads_statistics: Whether it looks at the average's BatchNorm statistics itself, as one does whose training goes
            on from the average. Where not, the core refreshes them only when the average is about to be measured.
    """

    same_on_all_ranks: ClassVar[bool] = True
    reads_statistics: ClassVar[bool] = True

    def attach(self, model: nn.Module, schedule: Schedule) -> None:
        """Called once, before training and :meth:`restore`, with the model on its device."""

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called before each epoch; may change the model's weights."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each update; ``step`` counts from 0 over the whole training."""

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Called after each epoch; says whether the average moved, so that its BatchNorm statistics are refreshed."""
        return False

    def smoothed(self) -> nn.Module | None:
        """The averaged model, a module of its own in eval mode, or None while there is none."""
        return None


def total(terms: Terms) -> Tensor:
    """The training loss: the sum of its terms, a scalar.

    Raises:
        ValueError: A term is no scalar.
    """
    wrong = next((name for name, term in terms.items() if term.shape != ()), None)
    if wrong is not None:
        raise ValueError(f"the term '{wrong}' is of shape {tuple(terms[wrong].shape)}, and no scalar")
    return torch.stack(list(terms.values())).sum()
