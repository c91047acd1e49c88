"""What the checks of an audit work with: the model and everything that is done to it, and their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from at_smooth import registry
from at_smooth.data import Part, as_float
from at_smooth.interfaces import Evaluator, Outcome
from at_smooth.threat import Threat


class Limits(BaseModel):
    """When a check fails, and what it is made with. Points are percent of the examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=20, ge=1, description="steps of the usual PGD")
    more_steps: int = Field(default=100, ge=1, description="steps of the longer PGD")
    restarts: int = Field(default=5, ge=1, description="restarts of the longer PGD")
    left: float = Field(default=5.0, allow_inf_nan=False, description="RA that may be left when any image is allowed")
    rise: float = Field(
        default=2.0, allow_inf_nan=False, description="points by which a stronger attack may help the model"
    )
    gain: float = Field(
        default=8.0, allow_inf_nan=False, description="points by which more steps and restarts may beat the usual PGD"
    )
    gap: float = Field(
        default=12.0, allow_inf_nan=False, description="points by which the reference may beat the longer PGD"
    )
    beaten: float = Field(
        default=2.0, allow_inf_nan=False, description="points by which noise or transfer may beat the usual PGD"
    )
    zero: float = Field(
        default=5.0, allow_inf_nan=False, description="examples whose gradient may be zero or not finite, in percent"
    )
    flat: float = Field(
        default=20.0, allow_inf_nan=False, description="examples whose loss may not rise along the gradient, in percent"
    )
    attack: str = Field(default="pgd", description="evaluator that is the usual attack; has steps and restarts")
    noise: str = Field(default="noise", description="evaluator that is random noise")
    reference: str = Field(default="autoattack", description="evaluator that is held to be reliable")
    surrogate: str = Field(default="convnet", description="model that is trained on the audited one's predictions")


@dataclass(frozen=True)
class Verdict:
    """What one check came to.

    Attributes:
        check: Its name.
        sound: Whether it found nothing wrong.
        found: What it found, in words.
        figures: The same in numbers, in plain types.
    """

    check: str
    sound: bool
    found: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """A model with everything that the checks do to it; each attack runs once.

    Attributes:
        model: In eval mode, frozen, on the device.
        part: The examples that it is audited on, on the device.
        threat: What the adversary may do.
        limits: When a check fails.
        attacked: Runs an evaluator on model and part: its label, the plugin, the threat.
        surrogate: Trains a network on the model's predictions.
    """

    model: nn.Module
    part: Part
    threat: Threat
    limits: Limits
    attacked: Callable[[str, Evaluator, Threat], Outcome]
    surrogate: Callable[[], nn.Module]
    _known: dict[str, Outcome] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """(N, C, H, W), float32 in [0, 1], on the device."""
        return as_float(self.part.images)

    def usual(self, eps: float | None = None) -> Outcome:
        """The usual attack, with another radius if one is given."""
        eps = None if eps == self.threat.eps else eps  # the same attack, by the same name
        return self.under(self.limits.attack, eps, steps=self.limits.steps)

    def longest(self) -> Outcome:
        """The usual attack with more steps and restarts."""
        return self.under(self.limits.attack, steps=self.limits.more_steps, restarts=self.limits.restarts)

    def under(self, evaluator: str, eps: float | None = None, **options: Any) -> Outcome:
        """What stands under an evaluator."""
        threat = Threat(self.threat.norm, self.threat.eps if eps is None else eps)
        said = ", ".join(f"{name} {value}" for name, value in options.items())
        label = f"{evaluator} ({said})" if said else evaluator
        label = label if eps is None else f"{label}, {threat}"
        if label not in self._known:
            self._known[label] = self.attacked(label, registry.build("evaluators", evaluator, options), threat)
        return self._known[label]


#: A check looks at a bench and comes to a verdict.
Check = Callable[[Bench], Verdict]
