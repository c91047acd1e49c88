"""Any attack of torchattacks as an evaluator, by ``torchattacks:CLASS``."""

from __future__ import annotations

import inspect
from typing import ClassVar

import torchattacks
from pydantic import ConfigDict
from torch import Tensor

from at_smooth.attacks import Adversary, AttackSpec
from at_smooth.exceptions import OptionError, PluginError
from at_smooth.interfaces import Evaluator, Task
from at_smooth.threat import Threat


class LibraryEvaluator(Evaluator):
    """Accuracy under an attack of torchattacks; its options are those of the class's constructor."""

    model_config = ConfigDict(extra="allow")

    attack: ClassVar[type[torchattacks.attack.Attack]]

    @classmethod
    def around(cls, attack: type[torchattacks.attack.Attack]) -> type[LibraryEvaluator]:
        """The evaluator that runs ``attack``.

        Raises:
            PluginError: The class is no attack that torchattacks ships.
        """
        if getattr(torchattacks, attack.__name__, None) is not attack:
            raise PluginError(f"{attack.__name__} is no attack that torchattacks ships. Derive an Evaluator around it.")
        return type(attack.__name__, (cls,), {"attack": attack, "__annotations__": {"attack": ClassVar[type]},
                                              "__doc__": inspect.getdoc(attack), "__module__": __name__})  # fmt: skip

    def check(self, threat: Threat, num_classes: int) -> None:
        """Refuse a threat of another norm, and options that the class does not have."""
        super().check(threat, num_classes)
        if "mode" in (self.model_extra or {}):
            raise OptionError(f"evaluator {self.attack.__name__}: leave the option mode out; it is eval.")
        self._spec(threat, num_classes)

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """Call the attack."""
        return Adversary(task.model, self._spec(task.threat, task.num_classes, task.seed))(images, labels)

    def _spec(self, threat: Threat, num_classes: int, seed: int = 0) -> AttackSpec:
        accepted = inspect.signature(self.attack).parameters
        known = {"n_classes": num_classes, "seed": seed}  # some classes take the time for a seed
        usual = {name: value for name, value in known.items() if name in accepted}
        options = {**usual, **(self.model_extra or {}), "mode": "eval"}
        return AttackSpec.parse(f"torchattacks:{self.attack.__name__}", threat, options)
