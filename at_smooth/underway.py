"""The epoch in hand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from at_smooth.measuring import Row
from at_smooth.step import Taken


@dataclass
class Underway:
    """The epoch in hand: what it takes to go on in the middle of it, and what its row is made of.

    Attributes:
        epoch: Which one, counted from 0.
        lr: Its learning rate.
        loss: Sum over its examples so far, a scalar.
        correct: How many of them were classified correctly under attack, a scalar.
        batches: How many are done.
        seconds: What it took before an interruption.
    """

    epoch: int
    lr: float
    loss: Tensor
    correct: Tensor
    batches: int = 0
    seconds: float = 0.0

    def add(self, taken: Taken) -> None:
        """Count a step in."""
        self.loss = self.loss + taken.loss
        self.correct = self.correct + taken.correct
        self.batches += 1

    def figures(self, n: int) -> Row:
        """``lr``, ``train_loss`` and ``train_acc`` (percent, on the attacked images) of an epoch of ``n`` examples."""
        return {"lr": self.lr, "train_loss": self.loss.item() / n, "train_acc": 100 * self.correct.item() / n}
