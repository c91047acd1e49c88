"""What a bug report needs, and whether training works here."""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from at_smooth import registry
from at_smooth._version import __version__
from at_smooth.attacks import Adversary
from at_smooth.checkpoint import load
from at_smooth.engine import Engine
from at_smooth.exceptions import AtSmoothError, PluginError
from at_smooth.experiment import load_data, load_model, train
from at_smooth.measuring import Row
from at_smooth.observer import Observer
from at_smooth.printing import listing
from at_smooth.progress import Silent
from at_smooth.recipe import Recipe
from at_smooth.run import Run
from at_smooth.runtime import Runtime, describe
from at_smooth.teacher_cache import cache_directory
from at_smooth.terminal import Console
from at_smooth.versions import installed

_PACKAGES = (
    *("torch", "torchvision", "torchattacks", "pyautoattack", "advertorch", "numpy", "scikit-learn", "pydantic"),
    *("matplotlib", "click", "rich", "requests"),
)


def examine(console: Console) -> None:
    """Print versions, device, plugins with their failures and known traps, then train a little.

    Raises:
        AtSmoothError: The self-test failed.
    """
    versions = listing("versions", "name", "version")
    versions.add_row("at-smooth", __version__)
    versions.add_row("python", f"{platform.python_version()} ({sys.executable})")
    versions.add_row("platform", platform.platform())
    for package in _PACKAGES:
        versions.add_row(package, installed(package) or "not installed")
    versions.add_row("CUDA of torch", torch.version.cuda or "none")
    versions.add_row("device", describe(Runtime.choose().device))
    versions.add_row("cache", str(cache_directory()))
    console.print(versions)
    _print_plugins(console)
    for trap in traps():
        console.print(f"trap: {trap}", soft_wrap=True)
    began = time.perf_counter()
    self_test()
    seconds = time.perf_counter() - began
    console.print(f"self-test passed in {seconds:.1f} s: trained, attacked, saved, resumed to the same bits.")


def _print_plugins(console: Console) -> None:
    table = listing("plugins", "kind", "plugins", "what is wrong")
    for kind in registry.KINDS:
        names, failures = [], []
        for entry in registry.entries(kind):
            try:
                registry.load(kind, entry.name)
            except PluginError as error:
                failures.append(str(error))
            names.append(entry.name)
        if names:
            table.add_row(kind, str(len(names)), "\n".join(dict.fromkeys(failures)) or "-")
    console.print(table)


def traps() -> list[str]:
    """What is installed here and known to trip people up, with the way round."""
    return [trap for trap in (_robustbench(), _advertorch(), _torchvision(), _requests(), _cuda()) if trap]


def _robustbench() -> str | None:
    owners = metadata.packages_distributions().get("robustbench", [])
    if "torchattacks" not in owners or find_spec("robustbench") is None:
        return None
    return (
        "'import robustbench' gives the folder that torchattacks installs, not RobustBench. "
        "If you need that, install it into an environment without torchattacks."
    )


def _advertorch() -> str | None:
    spec = find_spec("advertorch")
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in Path(folder).glob("attacks/*.py"):
            if "gradcheck import zero_gradients" in file.read_text(encoding="utf-8", errors="replace"):
                return (
                    f"'import advertorch.attacks' fails as it is on torch {torch.__version__}, whose "
                    f"torch.autograd.gradcheck has lost zero_gradients; at-smooth mends that where it needs advertorch."
                )
    return None


def _torchvision() -> str | None:
    try:
        from torchvision.ops import nms  # noqa: F401
    except Exception as error:  # a mismatch shows itself in several ways
        return (
            f"torchvision {installed('torchvision')} does not fit torch {torch.__version__} ({error}). "
            f"Install both from the same index."
        )
    return None


def _requests() -> str | None:
    version = installed("requests")
    if version is None or not version.startswith("2.25."):
        return None
    return (
        f"requests {version} is old; torchattacks pins it and never imports it. Where that conflicts with your "
        f"packages, override the pin or install torchattacks with --no-deps."
    )


def _cuda() -> str | None:
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    return f"torch is built for CUDA {torch.version.cuda}, but no GPU can be used; training runs on the CPU."


class _StopError(Exception):
    """Ends the first part of the self-test."""


class _StopAfterOne(Silent):
    @contextmanager
    def phase(self, role: str, recipe: Recipe, path: Path) -> Iterator[Observer]:
        yield _Stopping()


class _Stopping(Observer):
    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        raise _StopError


def self_test() -> None:
    """Train for two epochs, once whole and once in two parts; compare, and attack what came out.

    Raises:
        AtSmoothError: Something does not work; the message says what.
    """
    recipe = Recipe(epochs=2, eval_steps=2, test_every=0, deterministic=True)
    try:
        with tempfile.TemporaryDirectory(prefix="at-smooth-doctor-") as name:
            folder = Path(name)
            whole = train(recipe, folder / "whole")
            try:
                train(recipe, folder / "parts", progress=_StopAfterOne())
            except _StopError:
                parts = train(recipe, folder / "parts", resume=True)
            _compare(whole, parts)
            _attack(whole)
    except AtSmoothError:
        raise
    except Exception as error:  # whatever it is, it is the finding
        raise AtSmoothError(f"the self-test failed: {type(error).__name__}: {error}") from error


def _compare(whole: Run, parts: Run) -> None:
    one, other = (load(run.checkpoint("final"))["raw"] for run in (whole, parts))
    broken = [name for name, tensor in one.items() if not tensor.isfinite().all()]
    if broken:
        raise AtSmoothError(f"the self-test failed: trained weights are not finite ({', '.join(broken)}).")
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    if differing:
        raise AtSmoothError(f"the self-test failed: a resumed run ends with other weights ({', '.join(differing)}).")


def _attack(run: Run) -> None:
    batch = next(load_data(run.path).val.batches(32))
    perturbed = Adversary(load_model(run.path), run.recipe.attack_spec)(batch.clean, batch.labels)
    moved = (perturbed - batch.clean).abs().max().item()
    if not 0 < moved <= run.recipe.eps + 1e-6:
        raise AtSmoothError(f"the self-test failed: the attack moved a pixel by {moved:g}, eps is {run.recipe.eps:g}.")
