"""at-smooth: adversarial training with learned smoothening.

Everything that users and plugin authors need is a name of this package; each is imported when first used, so that
``import at_smooth`` is quick and loads no plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from at_smooth._version import __version__

if TYPE_CHECKING:
    from at_smooth.attacks import CLEAN, FGSM, PGD, Adversary, AttackSpec, Clean
    from at_smooth.data import Augmentation, Data, Part
    from at_smooth.engine import Engine
    from at_smooth.evaluation import Evaluation, evaluate
    from at_smooth.exceptions import (
        AtSmoothError,
        BenchError,
        CheckpointError,
        DataError,
        DivergedError,
        ExportError,
        FileError,
        InputError,
        Interrupted,
        OptionError,
        PluginError,
        RunError,
        StorageError,
        TakenError,
        UntrustedError,
    )
    from at_smooth.experiment import load_data, load_model, train
    from at_smooth.interfaces import (
        Analysis,
        Architecture,
        Batch,
        Dataset,
        Evaluator,
        Images,
        Method,
        Outcome,
        Plugin,
        Regularizer,
        Schedule,
        Size,
        Step,
        Study,
        Task,
        Teachers,
        Terms,
        TrainingPlugin,
        WeightSmoother,
    )
    from at_smooth.notes import AtSmoothWarning, notify
    from at_smooth.observer import Observer
    from at_smooth.recipe import Recipe
    from at_smooth.registry import create
    from at_smooth.run import Run
    from at_smooth.runtime import Runtime
    from at_smooth.settings import Settings
    from at_smooth.teacher_cache import cache_directory
    from at_smooth.threat import OptionalPixels, Pixels, Threat, format_pixels
    from at_smooth.trust import trust_code

_HOME = {
    "attacks": ("CLEAN", "FGSM", "PGD", "Adversary", "AttackSpec", "Clean"),
    "data": ("Augmentation", "Data", "Part"),
    "engine": ("Engine",),
    "notes": ("AtSmoothWarning", "notify"),
    "observer": ("Observer",),
    "evaluation": ("Evaluation", "evaluate"),
    "exceptions": (
        "AtSmoothError",
        "BenchError",
        "CheckpointError",
        "DataError",
        "DivergedError",
        "ExportError",
        "FileError",
        "InputError",
        "Interrupted",
        "OptionError",
        "PluginError",
        "RunError",
        "StorageError",
        "TakenError",
        "UntrustedError",
    ),
    "experiment": ("load_data", "load_model", "train"),
    "interfaces": (
        "Analysis",
        "Architecture",
        "Batch",
        "Dataset",
        "Evaluator",
        "Images",
        "Method",
        "Outcome",
        "Plugin",
        "Regularizer",
        "Schedule",
        "Size",
        "Step",
        "Study",
        "Task",
        "Teachers",
        "Terms",
        "TrainingPlugin",
        "WeightSmoother",
    ),
    "recipe": ("Recipe",),
    "registry": ("create",),
    "run": ("Run",),
    "runtime": ("Runtime",),
    "settings": ("Settings",),
    "teacher_cache": ("cache_directory",),
    "threat": ("OptionalPixels", "Pixels", "Threat", "format_pixels"),
    "trust": ("trust_code",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CLEAN",
    "FGSM",
    "PGD",
    "Adversary",
    "Analysis",
    "Architecture",
    "AtSmoothError",
    "AtSmoothWarning",
    "AttackSpec",
    "Augmentation",
    "Batch",
    "BenchError",
    "CheckpointError",
    "Clean",
    "Data",
    "DataError",
    "Dataset",
    "DivergedError",
    "Engine",
    "Evaluation",
    "Evaluator",
    "ExportError",
    "FileError",
    "Images",
    "InputError",
    "Interrupted",
    "Method",
    "Observer",
    "OptionError",
    "OptionalPixels",
    "Outcome",
    "Part",
    "Pixels",
    "Plugin",
    "PluginError",
    "Recipe",
    "Regularizer",
    "Run",
    "RunError",
    "Runtime",
    "Schedule",
    "Settings",
    "Size",
    "Step",
    "StorageError",
    "Study",
    "TakenError",
    "Task",
    "Teachers",
    "Terms",
    "Threat",
    "TrainingPlugin",
    "UntrustedError",
    "WeightSmoother",
    "__version__",
    "cache_directory",
    "create",
    "evaluate",
    "format_pixels",
    "load_data",
    "load_model",
    "notify",
    "train",
    "trust_code",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'at_smooth' has no attribute {name!r}")
    value = getattr(import_module(f"at_smooth.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
