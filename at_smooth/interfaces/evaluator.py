"""Whoever attacks a finished model: what it is given, and what it finds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from at_smooth.exceptions import OptionError
from at_smooth.interfaces.plugin import Plugin
from at_smooth.threat import Threat


@dataclass(frozen=True)
class Task:
    """What an evaluator works on.

    Attributes:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K); a copy, in eval mode, frozen, float32.
        threat: What the adversary may do.
        num_classes: K.
        seed: For libraries that want one; torch's global generators are seeded already.
        note: Keeps a line for whoever reads the result, such as a library's warning.
    """

    model: nn.Module
    threat: Threat
    num_classes: int
    seed: int
    note: Callable[[str], None]


@dataclass
class Outcome:
    """What one evaluator did to N examples.

    Attributes:
        stages: The names of its stages, in order.
        broken_by: Which stage broke each example, (N,) int64, on the CPU; -1 where it stands.
        distances: L2 length of the perturbation that broke it, in [0, 1] pixel units, (N,); inf where it stands.
        seconds: How long the attacks took.
        notes: What the evaluator had to say.
        figures: What it measured besides.
    """

    stages: list[str]
    broken_by: Tensor
    distances: Tensor
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def standing(self) -> Tensor:
        """Which examples the model still gets right, (N,) bool."""
        return self.broken_by < 0

    @property
    def accuracy(self) -> float:
        """Their share, in percent."""
        return percent(self.standing)

    @property
    def broke(self) -> dict[str, int]:
        """How many examples each stage broke that no stage before it had."""
        return {stage: int((self.broken_by == number).sum()) for number, stage in enumerate(self.stages)}


class Evaluator(Plugin):
    """Says which examples a model still gets right.

    It attacks in one stage or several (restarts, targets, different attacks). A stage gets the examples that the
    stages before it left standing, in batches, each on a stream of randomness of its own. The core judges what comes
    back, remembers what is done, and carries on after an interruption; an evaluator only perturbs.
    """

    #: Whether its perturbations keep to the threat's radius, so that it counts in the worst case over evaluators.
    bounded: ClassVar[bool] = True

    def check(self, threat: Threat, num_classes: int) -> None:
        """Refuse what it cannot work on, before anything costs time.

        Raises:
            OptionError: It cannot attack under this threat, or with so many classes.
        """
        if threat.eps == 0:
            raise OptionError("eps is 0, so there is nothing to attack. Give --eps, or evaluate with clean alone.")

    def stages(self, task: Task) -> list[str]:
        """The names of its stages, in order."""
        return ["attack"]

    @abstractmethod
    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """One stage of the attack on one batch.

        Args:
            task: Model and threat.
            stage: One of :meth:`stages`.
            images: (N, C, H, W), float32 in [0, 1], on the model's device.
            labels: True classes, (N,).

        Returns:
            Images of the same shape. Where ``bounded``, only those within the threat's radius count.
        """

    def fingerprint(self) -> str:
        """What its results depend on besides its options, such as a file's content; asked for after :meth:`check`.

        An interrupted evaluation carries on only where this is the same.
        """
        return ""

    def figures(self, task: Task, outcome: Outcome) -> dict[str, Any]:
        """What to report beside the accuracy, in plain types, once all stages are done."""
        return {}


def percent(which: Tensor) -> float:
    """The share that is true, (N,) bool, in percent."""
    return 100 * int(which.sum()) / len(which)
