"""The best epoch so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from at_smooth.measuring import Row


@dataclass
class Best:
    """The best epoch so far of one kind of weights.

    Attributes:
        score: What was measured of it, in percent.
        row: All that was.
        weights: The model's then, on the CPU.
    """

    score: float = -1.0
    row: Row = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, score: float | None, row: Row, model: nn.Module) -> bool:
        """Take an epoch that is better than all before it, and say whether it was. Of equals the first is the best."""
        if score is None or score <= self.score:
            return False
        self.score, self.row = score, row
        self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return True
