"""The run directory: recipe, environment, metrics, checkpoints, summary."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from at_smooth import checkpoint, files, records
from at_smooth._version import __version__
from at_smooth.engine import Engine
from at_smooth.exceptions import CheckpointError, DivergedError, FileError, RunError
from at_smooth.lock import NAME as LOCK
from at_smooth.measuring import COLUMNS, Row, rows_of
from at_smooth.observer import Observer
from at_smooth.ranks import Ranks
from at_smooth.reading import json_of, text_of
from at_smooth.recipe import HARMLESS, Recipe, added_options, differences, read_yaml
from at_smooth.versions import installed, versions

Summary = dict[str, Any]

#: Where the best weights of each kind are.
BEST = {"raw": "best", "smoothed": "best_smoothed"}
#: What a run writes, and nobody else: files, and folders with all that is in them.
WRITTEN = (
    *("recipe.yaml", "environment.json", "metrics.csv", "summary.json", "curves.png", "divergence.pt"),
    *("checkpoints", "teachers"),
)
_SAVE_EVERY = 15 * 60  # seconds of a long epoch that a kill may cost
_PREFIX = {"raw": "", "smoothed": "smoothed_"}


#: What the unfinished runs were trained with whose ``recipe.yaml`` was compared, by its version.
_trained_with: dict[tuple[Path, int, int, int], dict[str, Any]] = {}


class Run:
    """A run directory.

    Args:
        path: The directory, which holds a run.
        elsewhere: It may lie on another machine, where the first of several ranks writes it.

    Raises:
        RunError: There is no run.
    """

    def __init__(self, path: Path | str, elsewhere: bool = False) -> None:
        self.path = files.usable_path(path)
        if not elsewhere and not (self.path / "recipe.yaml").is_file():
            within = sorted(self.path.glob("*/recipe.yaml")) if self.path.is_dir() else []
            advice = f" Runs lie below it; give one of them, such as {within[0].parent}." if within else ""
            raise RunError(f"{self.path} is no run directory: it holds no recipe.yaml.{advice}")

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Run:
        """Begin a run in a new or empty directory.

        Raises:
            RunError: The directory holds a run or other files, or cannot be made.
            StorageError: It cannot be written to.
        """
        refuse_taken(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create {path}: {error.strerror}. Choose another --out.") from None
        files.write_atomically(path / "recipe.yaml", recipe.to_yaml().encode())
        return cls(path)

    def discard(self) -> None:
        """Remove what a run that came to nothing has written; the folder itself stays, and what else is in it."""
        for path in map(self.path.joinpath, WRITTEN):
            with suppress(OSError):  # the reason to discard it is to be heard
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    @property
    def recipe(self) -> Recipe:
        """What it is trained with; see :attr:`recorded`."""
        return Recipe(self.path / "recipe.yaml", **self.recorded)

    @property
    def recorded(self) -> dict[str, Any]:
        """What it is trained with, in plain types, whether or not the plugins are installed here.

        That is what its summary says, or before the end its state to resume from; before anything was saved,
        ``recipe.yaml``. Fields that change nothing about what is trained are as ``recipe.yaml`` has them.

        Raises:
            RunError: ``recipe.yaml`` says otherwise.
        """
        file = self.path / "recipe.yaml"
        written, trained = read_yaml(file), self._trained_with()
        changed = {**differences(trained, written, ignoring=HARMLESS), **added_options(trained, written)}
        if changed:
            raise RunError(
                f"{file} is not what the run was trained with: {'; '.join(changed.values())}. Put it back, or train "
                f"the changed recipe as a new run: at-smooth train --recipe {file} --out NEW"
            )
        return {**written, **trained, **{field: written[field] for field in HARMLESS if field in written}}

    def _trained_with(self) -> dict[str, Any]:
        """The recipe in the summary, or in ``last.pt``; empty before anything was saved."""
        if self.finished:
            recipe: dict[str, Any] = self.summary["recipe"]
            return recipe
        last, found = self.checkpoint("last"), (self.path / "recipe.yaml").stat()
        if not last.is_file():
            return {}
        version = (self.path.absolute(), found.st_mtime_ns, found.st_size, found.st_ino)
        if version not in _trained_with:  # a large file, which may be replaced at any moment, is not read for each look
            with checkpoint.fitting(last):
                recipe = checkpoint.load(last)["recipe"]
                records.RecordedRecipe.model_validate(recipe)
                _trained_with[version] = recipe
        return _trained_with[version]

    def refuse_other(self, path: Path, content: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with another recipe.

        Args:
            path: The file, for the message.
            content: What it holds.

        Raises:
            CheckpointError: It was.
        """
        with checkpoint.fitting(path):
            changed = differences(self.recorded, content["recipe"], ignoring=HARMLESS)
        if changed:
            raise CheckpointError(
                f"{path} is not of the run {self.path}: {'; '.join(changed.values())}. Put the file back that "
                f"belongs here."
            )

    @property
    def finished(self) -> bool:
        """Whether training reached its end."""
        return (self.path / "summary.json").is_file()

    @property
    def summary(self) -> Summary:
        """The content of ``summary.json``.

        Raises:
            RunError: The run is not finished.
            FileError: The file is damaged.
        """
        if not self.finished:
            raise RunError(f"{self.path} is not finished. Continue it with: at-smooth train --out {self.path} --resume")
        content: Summary = json_of(self.path / "summary.json", records.Summary)
        return content

    @property
    def environment(self) -> dict[str, Any]:
        """The content of ``environment.json``; empty where it is missing or damaged, since nothing depends on it."""
        try:
            content: dict[str, Any] = json_of(self.path / "environment.json", records.Environment)
        except FileError:
            return {}
        return content

    @property
    def history(self) -> list[Row]:
        """The rows of ``metrics.csv``, one an epoch.

        Raises:
            FileError: The file is missing or damaged.
        """
        path = self.path / "metrics.csv"
        return rows_of(path, text_of(path))

    def checkpoint(self, name: str) -> Path:
        """The path of one of ``last``, ``best``, ``best_smoothed``, ``final``."""
        return self.path / "checkpoints" / f"{name}.pt"

    def snapshot(self, epoch: int) -> Path:
        """The path of the snapshot after an epoch, counted from 1."""
        return self.checkpoint(f"epoch-{epoch:04d}")


class Recorder(Observer):
    """Writes a run directory while training goes on.

    Every file is replaced whole, and in an order in which a kill between two of them loses nothing: ``last.pt`` first,
    which is enough to write the others again.

    Args:
        run: Where.
        recipe: What is trained.
        fingerprint: The data's.
        ranks: Who trains; the first of them writes.
        teachers: The digest of each teacher's weights, by name; filled in before training begins.
        check: Called before each write; raises where the run directory is no longer the one that was begun.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        fingerprint: str,
        ranks: Ranks | None = None,
        teachers: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._ranks = ranks or Ranks()
        self._teachers = {} if teachers is None else teachers
        self._check = check
        self._recipe = recipe
        self._saved_at = time.monotonic()
        self._identity: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "fingerprint": fingerprint,
            "versions": versions(recipe),
        }

    def started(self, engine: Engine) -> None:
        """Note on what it runs; write again what a killed run may not have come to write."""
        self._identity.update(
            shape=list(engine.data.shape), num_classes=engine.data.num_classes, teachers=dict(self._teachers)
        )
        self._write("environment.json", _json(self._environment()))
        self._after_last(engine, [name for name, best in engine.best.items() if best.row.get("epoch") == engine.epoch])

    def stepped(self, engine: Engine) -> None:
        """In a long epoch, save now and then."""
        if time.monotonic() - self._saved_at > _SAVE_EVERY:
            with suppress(DivergedError) if self._ranks.count > 1 else nullcontext():  # which all find out together
                self.save(engine)

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        """Save a snapshot if one is due, the state to resume from, the best weights, the rows."""
        if engine.snapshot_due:
            smoothed = engine.snapshot.state_dict() if engine.snapshot else None
            content = {"raw": engine.model.state_dict(), "smoothed": smoothed, "row": row}
            self._save(self._run.snapshot(engine.epoch), content)
        self.save(engine)
        self._after_last(engine, improved)

    def save(self, engine: Engine) -> None:
        """Save the state to resume from."""
        self._save(self._run.checkpoint("last"), {"state": engine.state()})
        self._saved_at = time.monotonic()

    def diverged(self, engine: Engine, error: DivergedError) -> None:
        """Keep what diverged."""
        self._save(self._run.path / "divergence.pt", {"message": str(error), **error.dump})

    def finished(self, engine: Engine) -> None:
        """Write the final weights, the summary and the curves."""
        from at_smooth.report import draw_curves

        smoothed = engine.smoother.smoothed()
        self._save(
            self._run.checkpoint("final"),
            {
                "raw": engine.model.state_dict(),
                "smoothed": smoothed.state_dict() if smoothed else None,
                "row": engine.history[-1],
            },
        )
        if self._ranks.first:
            self._check()
            draw_curves(engine.history, engine.settings.decays(), self._run.path / "curves.png")
        examples = {"val": engine.data.val.n, "test": engine.data.test.n}
        test_set = engine.data.test_fingerprint() if engine.data.test.n else None
        figures = summarize(engine.history, _best_rows(engine), self._recipe)
        summary = {**figures, "examples": examples, "test_set": test_set}
        self._write("summary.json", _json(summary))

    def _after_last(self, engine: Engine, improved: list[str]) -> None:
        for weights in improved if engine.between_epochs else []:
            best = engine.best[weights]
            self._save(self._run.checkpoint(BEST[weights]), {weights: best.weights, "row": best.row})
        self._write("metrics.csv", _csv(COLUMNS, engine.history).encode())

    def _environment(self) -> dict[str, Any]:
        now, before = environment(self._recipe, self._ranks.count), self._run.environment
        return {**before, "resumed": [*before.get("resumed", []), now]} if before else now

    def _save(self, path: Path, content: dict[str, Any]) -> None:
        if not self._ranks.first:
            return
        self._check()
        with files.storing(path.parent):
            path.parent.mkdir(exist_ok=True)
        checkpoint.save(path, {**self._identity, **content})

    def _write(self, name: str, content: bytes) -> None:
        if self._ranks.first:
            self._check()
            files.write_atomically(self._run.path / name, content)


def _best_rows(engine: Engine) -> dict[str, Row]:
    """The row of each kind of weights' best epoch, its test figures measured now where they were not yet."""
    rows = {}
    for weights, best in engine.best.items():
        if not best.weights:
            continue
        rows[weights] = dict(best.row)
        sa, ra = f"{_PREFIX[weights]}test_sa", f"{_PREFIX[weights]}test_ra"
        if best.row[ra] is None and engine.settings.test_every and engine.data.test.n:
            rows[weights][sa], rows[weights][ra] = engine.accuracies_of(best.weights, engine.data.test)
    return rows


def refuse_taken(path: Path) -> None:
    """Refuse a directory that holds anything.

    Raises:
        RunError: It does.
    """
    if (path / "recipe.yaml").exists():
        raise RunError(f"{path} already holds a run. Continue it with --resume, or choose another --out.")
    if path.exists() and (not path.is_dir() or any(not _ours(each) for each in path.iterdir())):
        raise RunError(f"{path} exists and is not an empty folder. Choose another --out.")


def _ours(path: Path) -> bool:
    """Whether a file is what a run that was killed at its very beginning leaves behind."""
    return path.name == LOCK or path.match(".recipe.yaml.[0-9]*.part")


def summarize(history: list[Row], best: dict[str, Row], recipe: Recipe) -> Summary:
    """Best, final and their difference, as in the paper's tables, in percent.

    Args:
        history: A row an epoch.
        best: The row of the best epoch, by ``"raw"`` and, where there is an average, ``"smoothed"``.
        recipe: What was trained.
    """
    blocks = {weights: _block(history, row, _PREFIX[weights]) for weights, row in best.items()}
    return {
        "raw": blocks["raw"],
        "smoothed": blocks.get("smoothed"),
        "reported": "smoothed" if "smoothed" in blocks else "raw",
        "recipe": recipe.to_dict(),
        "seconds": round(sum(row["seconds"] or 0 for row in history), 1),
    }


def _block(history: list[Row], best: Row, prefix: str) -> dict[str, Any]:
    final = history[-1]
    last5 = [row[f"{prefix}test_ra"] for row in history[-5:]]
    measured = [ra for ra in last5 if ra is not None]
    return {
        "best": {
            "epoch": best["epoch"],
            "val_ra": best[f"{prefix}val_ra"],
            "test_ra": best[f"{prefix}test_ra"],
            "test_sa": best[f"{prefix}test_sa"],
        },
        "final": {
            "epoch": final["epoch"],
            "test_ra": final[f"{prefix}test_ra"],
            "test_sa": final[f"{prefix}test_sa"],
            "last5_ra_mean": statistics.fmean(measured) if measured else None,
            "last5_ra_sd": statistics.stdev(measured) if len(measured) > 1 else None,
        },
        "diff": {
            "ra": _difference(best[f"{prefix}test_ra"], final[f"{prefix}test_ra"]),
            "sa": _difference(best[f"{prefix}test_sa"], final[f"{prefix}test_sa"]),
        },
    }


def environment(recipe: Recipe, ranks: int = 1) -> dict[str, Any]:
    """Versions, device, number of ranks, seed and command: what repeating a run needs to know beside the recipe."""
    packages = ("torch", "torchvision", "torchattacks", "numpy", "pydantic", "scikit-learn")
    return {
        "at-smooth": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(recipe),
        "packages": {package: installed(package) for package in packages},
        "device": recipe.device,
        "ranks": ranks,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seed": recipe.seed,
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _difference(best: float | None, final: float | None) -> float | None:
    return None if best is None or final is None else best - final


def _csv(columns: list[str], rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
