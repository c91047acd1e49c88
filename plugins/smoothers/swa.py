"""Learned smoothing of the weights (the paper's section 2.2, Eq. 2, and A1.6)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from at_smooth import Schedule, WeightSmoother
from at_smooth_plugins.smoothers.averaging import Averaging


class NoSmoothing(WeightSmoother):
    """The weights as training leaves them."""

    def smoothed(self) -> nn.Module | None:
        """There is no average."""
        return None


class SWA(Averaging):
    """Stochastic weight averaging, W_SWA = (W_SWA n + W_T) / (n + 1): Eq. 2, once an epoch."""

    start: int | None = Field(
        default=None,
        ge=0,
        description="epochs to train before the average begins; default: until just after the first drop of the "
        "learning rate, or half the training where it never drops at once",
    )
    every: int = Field(default=1, ge=1, description="epochs from one averaged model to the next")

    _start: int = PrivateAttr()

    def attach(self, model: nn.Module, schedule: Schedule) -> None:
        """Make the averaged copy."""
        half, decay = schedule.epochs // 2, schedule.first_decay
        default = half if decay is None or decay >= schedule.epochs else decay
        self._start = default if self.start is None else self.start
        self._check_start(self._start, schedule.epochs)
        self._begin(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Take the epoch's weights into the average."""
        if epoch < self._start or (epoch - self._start) % self.every:
            return False
        self._average.update_parameters(model)
        return True


class ISWA(SWA):
    """iSWA (A1.6): as SWA, but each epoch starts from the average, W_T = W_SWA(T-1) + dW."""

    reads_statistics: ClassVar[bool] = True

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Start from the average."""
        average = self.smoothed()
        if average is not None:
            with torch.no_grad():
                for own, averaged in zip(_tensors(model), _tensors(average), strict=True):
                    own.copy_(averaged)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
