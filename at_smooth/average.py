"""Stochastic weight averaging after the fact, from the snapshots that a run kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.optim.swa_utils import AveragedModel

from at_smooth import checkpoint
from at_smooth.attacks import CLEAN, Adversary
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth.contracts import attack_of
from at_smooth.engine import Engine
from at_smooth.exceptions import InputError, RunError
from at_smooth.experiment import build_engine, prepare_data
from at_smooth.files import refuse_taken_file
from at_smooth.interfaces import Batch
from at_smooth.run import Run
from at_smooth.runtime import Runtime, deterministic_algorithms, fenced_randomness, limited_threads


@dataclass(frozen=True)
class Average:
    """An average of snapshots.

    Attributes:
        path: Its checkpoint, which ``load_model`` reads.
        epochs: What it is the average of, counted from 1.
        accuracies: SA and RA in percent, by ``"validation"`` and, where there is a test set, ``"test"``.
    """

    path: Path
    epochs: list[int]
    accuracies: dict[str, tuple[float, float]]


def average_snapshots(
    source: Path | str,
    *,
    first: int,
    every: int = 1,
    last: int | None = None,
    bn: str = "clean",
    out: Path | str | None = None,
) -> Average:
    """Average the raw weights of some epochs (Eq. 2), refresh BatchNorm, measure and save.

    With ``bn="clean"`` this is bit for bit the average that the smoother ``swa`` keeps during training with
    ``start=first - 1`` and the same ``every``.

    Args:
        source: A run that kept snapshots.
        first: First epoch, counted from 1.
        every: Epochs from one to the next.
        last: Last epoch at most; None for the last one kept.
        bn: Where BatchNorm statistics come from: ``"clean"`` training images as in SWA, or ``"adversarial"`` ones,
            which the run's attack makes against the average with its clean statistics, in eval mode.
        out: The file to write, which must not exist; None for one beside the snapshots.

    Raises:
        InputError: An epoch was not kept, a checkpoint does not fit, or the file exists.
        StorageError: The file cannot be written.
    """
    if bn not in ("clean", "adversarial"):
        raise InputError(f"bn is {bn!r}; choose clean or adversarial.")
    run = Run(source)
    recipe = run.recipe
    epochs = _epochs(run, first, every, last)
    path = Path(out) if out is not None else run.checkpoint(f"average-{first}-{epochs[-1]}-every-{every}-{bn}")
    refuse_taken_file(path)
    with limited_threads(recipe.threads), deterministic_algorithms(recipe.deterministic):
        runtime = Runtime.choose(recipe.device, recipe.precision, fast_layers=recipe.fast_layers)
        engine = build_engine(recipe, prepare_data(recipe), runtime)
        content, averaged = _averaged(engine, run, epochs)
        _refresh(engine, averaged, epochs[-1] - 1, bn)
        parts = {"validation": engine.data.val, "test": engine.data.test}
        figures = {name: engine.accuracies(averaged.module, part) for name, part in parts.items() if part.n}
    identity = {name: content[name] for name in ("recipe", "fingerprint", "versions", "shape", "num_classes")}
    row = {"epoch": epochs[-1], "averaged": epochs, "batchnorm": bn}
    checkpoint.save(path, {**identity, "smoothed": averaged.module.state_dict(), "row": row}, new=True)
    return Average(path, epochs, figures)


def _epochs(run: Run, first: int, every: int, last: int | None) -> list[int]:
    kept = sorted(
        int(found.group(1))
        for path in run.path.glob("checkpoints/epoch-*.pt")
        if (found := re.fullmatch(r"epoch-(\d+)\.pt", path.name))
    )
    if not kept:
        raise RunError(f"{run.path} kept no snapshots. Train it with --keep-checkpoints every=N.")
    wanted = list(range(first, (kept[-1] if last is None else last) + 1, every))
    missing = [epoch for epoch in wanted if epoch not in kept]
    if missing or not wanted:
        what = f"no snapshot of epoch {', '.join(map(str, missing))}" if wanted else f"no snapshot from {first} on"
        raise RunError(f"{run.path} kept {what}. It kept {', '.join(map(str, kept))}; choose --from, --every and --to.")
    return wanted


def _averaged(engine: Engine, run: Run, epochs: list[int]) -> tuple[dict[str, object], AveragedModel]:
    average = AveragedModel(engine.model)
    content = {}
    for epoch in epochs:
        path = run.snapshot(epoch)
        content = checkpoint.load(path)
        run.refuse_other(path, content)
        with checkpoint.fitting(path):
            engine.model.load_state_dict(content["raw"])
        average.update_parameters(engine.model)
    average.requires_grad_(False).eval()
    return content, average


def _refresh(engine: Engine, average: AveragedModel, epoch: int, bn: str) -> None:
    """Refresh the average's BatchNorm statistics on the batches that training would take."""
    settings = engine.settings

    def images() -> Iterator[Batch]:
        return engine.data.train_batches(epoch, settings.batch_size, "batchnorm")

    with fenced_randomness(settings.seed, "batchnorm"):
        refresh_batchnorm(average.module, (batch.clean for batch in images()), engine.model)
        if bn == "adversarial":
            still = copy.deepcopy(average.module)  # its statistics stand still while the average's move
            attack = attack_of(engine.method, engine.wanted_attack)
            spec = engine.wanted_attack if attack is CLEAN else attack
            adversary = Adversary(still, spec.model_copy(update={"mode": "eval"}))
            attacked = (adversary(batch.clean, batch.labels) for batch in images())
            refresh_batchnorm(average.module, attacked, engine.model)
