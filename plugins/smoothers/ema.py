"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from at_smooth import Schedule, WeightSmoother


class EMA(WeightSmoother):
    """W_EMA = decay W_EMA + (1 - decay) W after every step, from the start or from an epoch on."""

    decay: float = Field(default=0.995, ge=0, lt=1, description="share of the old average that each step keeps")
    start: int = Field(default=0, ge=0, description="epochs to train before the average begins")

    _average: AveragedModel = PrivateAttr()
    _first_step: int = PrivateAttr()

    def attach(self, model: nn.Module, schedule: Schedule) -> None:
        """Make the averaged copy."""
        self._first_step = self.start * schedule.steps_per_epoch
        decay = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(model, multi_avg_fn=decay)
        self._average.requires_grad_(False).eval()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Move the average a little towards the weights."""
        if step >= self._first_step:
            self._average.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """The average moved in every step."""
        return epoch >= self.start

    def smoothed(self) -> nn.Module | None:
        """The average, once it has begun."""
        return self._average.module if self._average.n_averaged else None

    def state(self) -> dict[str, Any]:
        """The average."""
        return dict(self._average.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the average."""
        self._average.load_state_dict(state)
