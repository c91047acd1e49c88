"""What all averages of weights have in common: torch's ``AveragedModel``, kept in eval mode."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PrivateAttr
from torch import nn
from torch.optim.swa_utils import AveragedModel

from at_smooth import OptionError, WeightSmoother


class Averaging(WeightSmoother):
    """A smoother that keeps an average; its subclasses say when the average moves, and how."""

    reads_statistics: ClassVar[bool] = False

    _average: AveragedModel = PrivateAttr()

    def _check_start(self, start: int, epochs: int) -> None:
        if start >= epochs:
            raise OptionError(
                f"the average begins after {start} epochs, but training ends after {epochs}. "
                f"Lower -S start or raise --epochs."
            )

    def _begin(self, model: nn.Module, **how: Any) -> None:
        """Make the averaged copy; ``how`` goes to ``AveragedModel``."""
        self._average = AveragedModel(model, **how)
        self._average.requires_grad_(False).eval()

    def smoothed(self) -> nn.Module | None:
        """The average, once it has begun."""
        return self._average.module if self._average.n_averaged else None

    def state(self) -> dict[str, Any]:
        """The average and how many models are in it."""
        return dict(self._average.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the average."""
        self._average.load_state_dict(state)
