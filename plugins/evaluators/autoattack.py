"""AutoAttack, by the library of its authors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from at_smooth import Evaluator, Outcome, PluginError, Task

Attack = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

#: The loss of an attack compares so many of the largest logits.
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}
_TARGETS = 9  # classes that the targeted attacks aim at in the standard version
_AGAIN = "apgd-ce (5 restarts)"


class AutoAttack(Evaluator):
    """AutoAttack (Croce and Hein, ICML 2020) in its standard version, attack after attack on what still stands.

    ``pyautoattack`` attacks, or ``autoattack`` where that is what is installed. A result equals that of the library
    called directly with the same examples, seed and batch size.
    """

    version: Literal["standard", "plus", "rand"] = Field(
        default="standard", description="set of attacks; 'rand' is for randomised defences"
    )
    attacks: tuple[Attack, ...] = Field(default=(), description="run these in place of the version's own")
    seed: int | None = Field(default=None, ge=0, description="the library's seed; default: that of the evaluation")

    @field_validator("attacks", mode="before")
    @classmethod
    def _one_is_fine(cls, attacks: Any) -> Any:
        return [attacks] if isinstance(attacks, str) else attacks

    def stages(self, task: Task) -> list[str]:
        """What is wrong already, then the library's attacks, as far as they can run with so many classes."""
        wanted = self.attacks or self._library_object(task, "cpu").attacks_to_run
        return ["clean", *_runnable(list(wanted), task)]

    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """One attack of the library on one batch."""
        if stage == "clean":
            return images
        library = self._library_object(task, images.device)
        library.attacks_to_run = [stage.partition(" ")[0]]
        if stage == _AGAIN:
            library.apgd.n_restarts = 5
            library.seed += 1  # other starting points than the first time
        targets = min(_TARGETS, task.num_classes - 1)
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
        _forget_calls()
        tracer = sys.gettrace()
        try:
            result = library.run_standard_evaluation(images, labels, **{_batch_size_of(library): len(images)})
        finally:
            sys.settrace(tracer)  # a check of the library's switches tracing off, and with it coverage and debuggers
        perturbed: Tensor = result[0] if isinstance(result, tuple) else result
        return perturbed

    def figures(self, task: Task, outcome: Outcome) -> dict[str, Any]:
        """Which library, and what its check on Square says."""
        module = _library()
        left, accuracies = len(outcome.broken_by), {}
        for stage, broken in outcome.broke.items():
            left -= broken
            accuracies[stage] = left / len(outcome.broken_by)
        _checks().check_square_sr(accuracies, logger=_Listener(task.note))
        return {"library": f"{module.__name__} {_version_of(module)}", "version": self.version,
                "seed": self._seed(task)}  # fmt: skip

    def _seed(self, task: Task) -> int:
        return task.seed if self.seed is None else self.seed

    def _library_object(self, task: Task, device: torch.device | str) -> Any:
        make = _library().AutoAttack
        quiet = {"verbose": False} if "verbose" in inspect.signature(make).parameters else {}
        library = make(task.model, norm=task.threat.norm, eps=task.threat.eps, seed=self._seed(task),
                       version=self.version, device=device, **quiet)  # fmt: skip
        library.verbose = False
        library.logger = library.apgd.logger = library.apgd_targeted.logger = _Listener(task.note)
        return library


class _Listener:
    """Stands for the library's logger: keeps its warnings, drops its reports."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def warning(self, message: str) -> None:
        self._note(str(message))

    def log(self, message: str) -> None:  # the way of the package 'autoattack'
        if message.startswith("Warning: "):
            self._note(message.removeprefix("Warning: "))

    def info(self, message: str) -> None:
        pass

    debug = info


def _runnable(wanted: list[str], task: Task) -> list[str]:
    """The attacks that can run with so many classes, and stand-ins for those that cannot."""
    runnable: list[str] = []
    for attack in wanted:
        needed = _CLASSES_NEEDED.get(attack, 2)
        if task.num_classes >= needed:
            runnable.append(attack)
            continue
        instead = "apgd-dlr" if task.num_classes == 3 else _AGAIN
        task.note(f"{attack} needs {needed} classes and there are {task.num_classes}; {instead} ran instead")
        runnable.append(instead)
    return list(dict.fromkeys(runnable))


def _library() -> ModuleType:
    for name in ("pyautoattack", "autoattack"):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise PluginError("AutoAttack is not installed. Install it with: python -m pip install pyautoattack")


def _checks() -> ModuleType:
    return import_module(f"{_library().__name__}.checks")


def _forget_calls() -> None:
    """The check for dynamic defences counts calls in a global dictionary, one model's with the next one's."""
    counts = getattr(_checks(), "funcs", {})
    counts.update(dict.fromkeys(counts, 0))


def _version_of(module: ModuleType) -> str:
    try:
        return metadata.version(module.__name__)
    except metadata.PackageNotFoundError:
        return ""


def _batch_size_of(library: Any) -> str:
    """The name of the parameter, which the two packages do not share."""
    return "batch_size" if type(library).__module__.startswith("pyautoattack") else "bs"
