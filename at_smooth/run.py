"""The run directory: recipe, environment, metrics, checkpoints, summary."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_smooth import checkpoint
from at_smooth._version import __version__
from at_smooth.engine import COLUMNS, Engine, Observer, Row
from at_smooth.exceptions import RunError
from at_smooth.recipe import Recipe

Summary = dict[str, Any]

_BEST = {"raw": "best", "smoothed": "best_smoothed"}
_PREFIX = {"raw": "", "smoothed": "smoothed_"}


class Run:
    """A run directory.

    Args:
        path: The directory, which holds a run.

    Raises:
        RunError: There is no run.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.yaml").is_file():
            raise RunError(f"{self.path} is no run directory: it holds no recipe.yaml.")

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Run:
        """Begin a run in a new or empty directory.

        Raises:
            RunError: The directory holds a run or other files, or cannot be made.
        """
        refuse_taken(path)
        try:
            (path / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise RunError(f"cannot create {path}: {error.strerror}. Choose another --out.") from None
        checkpoint.write_atomically(path / "environment.json", _json(environment(recipe)))
        checkpoint.write_atomically(path / "recipe.yaml", recipe.to_yaml().encode())
        return cls(path)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.from_yaml(self.path / "recipe.yaml")

    @property
    def finished(self) -> bool:
        """Whether training reached its end."""
        return (self.path / "summary.json").is_file()

    @property
    def summary(self) -> Summary:
        """The content of ``summary.json``.

        Raises:
            RunError: The run is not finished, or the file is damaged.
        """
        if not self.finished:
            raise RunError(f"{self.path} is not finished. Continue it with: at-smooth train --out {self.path} --resume")
        try:
            content: Summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'summary.json'} cannot be read ({error}).") from None
        if not isinstance(content, dict) or not {"raw", "smoothed", "reported", "recipe"} <= set(content):
            raise RunError(f"{self.path / 'summary.json'} is no summary of a run.")
        return content

    @property
    def history(self) -> list[Row]:
        """The rows of ``metrics.csv``, one an epoch.

        Raises:
            RunError: The file is missing or damaged.
        """
        try:
            with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            return [
                {column: _number(row[column], int if column == "epoch" else float) for column in COLUMNS}
                for row in rows
            ]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise RunError(f"{self.path / 'metrics.csv'} cannot be read ({error}).") from None

    def checkpoint(self, name: str) -> Path:
        """The path of one of ``last``, ``best``, ``best_smoothed``, ``final``."""
        return self.path / "checkpoints" / f"{name}.pt"


class Recorder(Observer):
    """Writes a run directory while training goes on.

    Args:
        run: Where.
        recipe: What is trained.
        fingerprint: The data's.
    """

    def __init__(self, run: Run, recipe: Recipe, fingerprint: str) -> None:
        self._run = run
        self._recipe = recipe
        self._identity: dict[str, Any] = {"recipe": recipe.to_dict(), "fingerprint": fingerprint}

    def started(self, engine: Engine) -> None:
        """Write the metrics so far; what a killed run had measured after its last checkpoint is measured again."""
        self._identity.update(shape=list(engine.data.shape), num_classes=engine.data.num_classes)
        checkpoint.write_atomically(self._run.path / "metrics.csv", _csv(COLUMNS, engine.history).encode())

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        """Save the best weights, then the state to resume from, then the row."""
        for weights in improved:
            self._save(_BEST[weights], {weights: engine.best[weights].weights, "row": row})
        self._save("last", {"state": engine.state()})
        with (self._run.path / "metrics.csv").open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)

    def finished(self, engine: Engine) -> None:
        """Write the final weights, the summary and the curves."""
        from at_smooth.report import draw_curves

        smoothed = engine.smoother.smoothed()
        self._save(
            "final",
            {
                "raw": engine.model.state_dict(),
                "smoothed": smoothed.state_dict() if smoothed else None,
                "row": engine.history[-1],
            },
        )
        draw_curves(engine.history, engine.settings.decays(), self._run.path / "curves.png")
        summary = summarize(engine.history, _best_rows(engine), self._recipe)
        summary["examples"] = {"val": engine.data.val.n, "test": engine.data.test.n}
        checkpoint.write_atomically(self._run.path / "summary.json", _json(summary))

    def _save(self, name: str, content: dict[str, Any]) -> None:
        checkpoint.save(self._run.checkpoint(name), {**self._identity, **content})


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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists and is not an empty folder. Choose another --out.")


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


def environment(recipe: Recipe) -> dict[str, Any]:
    """Versions, device, seed and command: what repeating a run needs to know beside the recipe."""
    packages = ("torch", "torchvision", "torchattacks", "numpy", "pydantic", "scikit-learn")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "at-smooth": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": recipe.device,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seed": recipe.seed,
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def best_weights(run: Run) -> dict[str, dict[str, Tensor]]:
    """The weights of the best epochs that a run has saved, by ``"raw"`` and ``"smoothed"``."""
    return {
        weights: checkpoint.load(run.checkpoint(name))[weights]
        for weights, name in _BEST.items()
        if run.checkpoint(name).is_file()
    }


def _difference(best: float | None, final: float | None) -> float | None:
    return None if best is None or final is None else best - final


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    return kind(text) if text else None


def _csv(columns: list[str], rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
