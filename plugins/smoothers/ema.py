"""Exponential moving average of the weights."""

from __future__ import annotations

from pydantic import Field, PrivateAttr
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from at_smooth import Schedule
from at_smooth_plugins.smoothers.averaging import Averaging


class EMA(Averaging):
    """W_EMA = decay W_EMA + (1 - decay) W after every step, from the start or from an epoch on."""

    decay: float = Field(default=0.995, ge=0, lt=1, description="share of the old average that each step keeps")
    start: int = Field(default=0, ge=0, description="epochs to train before the average begins")

    _first_step: int = PrivateAttr()

    def attach(self, model: nn.Module, schedule: Schedule) -> None:
        """Make the averaged copy."""
        self._check_start(self.start, schedule.epochs)
        self._first_step = self.start * schedule.steps_per_epoch
        self._begin(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]

    def after_step(self, model: nn.Module, step: int) -> None:
        """Move the average a little towards the weights."""
        if step >= self._first_step:
            self._average.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """The average moved in every step."""
        return epoch >= self.start
