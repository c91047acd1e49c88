"""A paper's table by one command: what it consists of, how long it takes, and the runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from at_smooth.data import Data, Part, held_out
from at_smooth.engine import Engine
from at_smooth.exceptions import DataError, RunError
from at_smooth.experiment import planned_teachers, prepare_data, train
from at_smooth.interfaces import Dataset, Size
from at_smooth.lock import NAME as LOCK
from at_smooth.lock import FileLock
from at_smooth.network import build_network
from at_smooth.presets import Table, TableRow, recipe_from
from at_smooth.progress import Progress
from at_smooth.recipe import CIRCUMSTANCES, Recipe
from at_smooth.run import Run
from at_smooth.runtime import Runtime, fenced_randomness


@dataclass(frozen=True)
class Planned:
    """A row of a table and the run that it becomes."""

    row: TableRow
    recipe: Recipe
    path: Path

    @property
    def run(self) -> Run | None:
        """The run, if it is finished.

        Raises:
            RunError: The folder holds a run of another recipe.
        """
        if not (self.path / "summary.json").is_file():
            return None
        run = Run(self.path)
        changed = run.recipe.differences(self.recipe, ignoring=CIRCUMSTANCES)
        if changed:
            raise RunError(f"{self.path} holds another run ({'; '.join(changed.values())}). Choose another --out.")
        return run


def plan(
    table: Table, out: Path, changes: Mapping[str, Any], rehearse: bool = False, preset: str | None = None
) -> list[Planned]:
    """The runs that a table consists of.

    Args:
        table: The table.
        out: The folder of its run directories.
        changes: Fields that the user sets in every row.
        rehearse: Shrink every row by the preset ``rehearse``: same plugins, embedded digits, minutes.
        preset: The preset to base the rows on; None for the table's own.
    """
    planned = []
    for row in table.rows:
        recipe = table.recipe(row, changes, preset)
        if rehearse:
            recipe = _rehearsal(recipe, changes)
        planned.append(Planned(row, recipe, out / row.name.replace("/", "--")))
    return planned


def carry_out(planned: list[Planned], progress: Progress, override: bool = False) -> None:
    """Train what is missing, carry on with what was interrupted, skip what is done."""
    for number, item in enumerate(planned, start=1):
        head = f"[{number}/{len(planned)}] {item.row.name}"
        if item.run:
            FileLock(item.path / LOCK).remove_leftover()
            progress.note(f"{head}: done before")
            continue
        begun = (item.path / "recipe.yaml").is_file()
        progress.note(f"{head}: {'continued' if begun else 'begins'}")
        train(item.recipe, item.path, resume=begun, override=begun and override, progress=progress)


def own_figures(run: Run, last5: bool) -> list[float | None]:
    """RA best, RA final, SA best, SA final of the reported weights, in the paper's order.

    Args:
        run: A finished run.
        last5: Whether final is the mean of the last five epochs.
    """
    summary = run.summary
    block = summary[summary["reported"]]
    best, final = block["best"], block["final"]
    if not last5:
        return [best["test_ra"], final["test_ra"], best["test_sa"], final["test_sa"]]
    prefix = "smoothed_" if summary["reported"] == "smoothed" else ""
    sa = [row[f"{prefix}test_sa"] for row in run.history[-5:]]
    measured = [value for value in sa if value is not None]
    return [best["test_ra"], final["last5_ra_mean"], best["test_sa"], fmean(measured) if measured else None]


class Forecast:
    """How long runs take on this device, measured on a few made-up images of the right shape.

    What was measured once serves every row of the same architecture, image shape, method and attack.
    """

    def __init__(self) -> None:
        self._measured: dict[tuple[object, ...], tuple[float, float]] = {}
        self._sizes: dict[str, Size] = {}
        self._taught: set[str] = set()

    def seconds(self, recipe: Recipe) -> float:
        """Seconds for a run, those for its self-teachers among them unless an earlier row trains the same."""
        total = self._training(recipe)
        for teacher in planned_teachers(recipe):
            if teacher.to_yaml() not in self._taught:
                self._taught.add(teacher.to_yaml())
                total += self._training(teacher)
        return total

    def teachers(self, recipe: Recipe) -> list[str]:
        """The methods of the self-teachers that a run would train."""
        return [teacher.method for teacher in planned_teachers(recipe)]

    def _training(self, recipe: Recipe) -> float:
        size = self._size(recipe)
        step, evaluation = self._per_image(recipe, size)
        models = 1 if recipe.smoother == Recipe.model_fields["smoother"].default else 2
        n_val = held_out(size.train, recipe.validation)
        evaluated = n_val * recipe.epochs / recipe.validate_every
        if recipe.test_every:
            evaluated += size.test * recipe.epochs / recipe.test_every
        return recipe.epochs * (size.train - n_val) * step + models * evaluated * evaluation

    def _per_image(self, recipe: Recipe, size: Size) -> tuple[float, float]:
        key = (recipe.model, str(recipe.model_options), size.shape, recipe.method, recipe.attack,
               str(recipe.attack_options), recipe.norm, recipe.precision, recipe.device)  # fmt: skip
        if key not in self._measured:
            self._measured[key] = _measure(recipe, size)
        return self._measured[key]

    def _size(self, recipe: Recipe) -> Size:
        dataset: Dataset = recipe.plugin("dataset")
        if dataset.published is not None:
            return dataset.published
        key = f"{recipe.dataset} {recipe.data_dir} {recipe.dataset_options}"
        if key not in self._sizes:
            if not dataset.available(recipe.data_dir):
                raise DataError(
                    f"how long runs on '{recipe.dataset}' take is not known before its files are here: it states no "
                    f"size, and a forecast downloads nothing. Give --data-dir, or leave --dry-run out."
                )
            data = prepare_data(recipe)
            self._sizes[key] = Size(data.shape, data.train.n + data.val.n, data.test.n, data.num_classes)
        return self._sizes[key]


def _measure(recipe: Recipe, size: Size) -> tuple[float, float]:
    """Seconds an image for a training step and for an evaluation."""
    runtime = Runtime.choose(recipe.device, recipe.precision, fast_layers=recipe.fast_layers)
    batch = min(recipe.batch_size, 4 if runtime.device.type == "cpu" else recipe.batch_size)
    with fenced_randomness(0, "forecast"):
        images = torch.randint(0, 256, (batch, *size.shape), dtype=torch.uint8)
        part = Part(images, torch.arange(batch) % size.num_classes)
        data = Data(part, part, part, size.num_classes)
        network = build_network(recipe, size.shape, size.num_classes, data.pixel_statistics())
        engine = Engine(
            network,
            data,
            method=recipe.plugin("method"),
            attack=recipe.attack_spec,
            settings=recipe.replacing(batch_size=batch, lr=1e-6),
            runtime=runtime,
        )
        engine.train_epoch(0)  # the first step is slow
        began = time.perf_counter()
        engine.train_epoch(1)
        trained = time.perf_counter()
        engine.accuracies(network, part)
        evaluated = time.perf_counter()
    return (trained - began) / batch, (evaluated - trained) / batch


def _rehearsal(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A row shrunk: everything about it that names a plugin stays, but for the data."""
    keep = ("model", "method", "method_options", "attack", "norm", "lr_schedule", "regularizer",
            "regularizer_options", "smoother")  # fmt: skip
    return recipe_from("rehearse", {**{field: getattr(recipe, field) for field in keep}, **changes})
