"""A run that may still be going on: what it has measured so far, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from at_smooth.grouping import recorded
from at_smooth.measuring import Row, rows_of
from at_smooth.reading import text_of
from at_smooth.run import Run


def history_so_far(run: Run) -> list[Row]:
    """The rows of ``metrics.csv`` that are whole, one an epoch; none where there is no such file yet.

    Training adds a line while others read, and a machine may stop in the middle of one, so a line without its end is
    none yet.

    Raises:
        FileError: The file is damaged otherwise.
    """
    path = run.path / "metrics.csv"
    if not path.exists():
        return []
    text = text_of(path)
    return rows_of(path, text[: text.rfind("\n") + 1])


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: Epochs done.
        epochs: Epochs wanted.
        finished: Whether it reached its end.
        seconds: Time spent in the epochs done.
    """

    epoch: int
    epochs: int
    finished: bool
    seconds: float

    @classmethod
    def of(cls, run: Run, history: list[Row] | None = None) -> Progress:
        """A run's."""
        rows = history_so_far(run) if history is None else history
        seconds = sum(row["seconds"] or 0 for row in rows)
        return cls(int(rows[-1]["epoch"] or 0) if rows else 0, int(recorded(run)["epochs"]), run.finished, seconds)

    @property
    def left(self) -> float | None:
        """Seconds to go, if the epochs to come take as long as those done; None where none is done."""
        return self.seconds / self.epoch * (self.epochs - self.epoch) if self.epoch else None

    def __str__(self) -> str:
        return "finished" if self.finished else f"epoch {self.epoch} of {self.epochs}"


def teachers_of(run: Run) -> list[Run]:
    """The runs of a run's self-teachers, those begun first."""
    folders = [path.parent for path in (run.path / "teachers").glob("*/recipe.yaml")]
    return [Run(path) for path in sorted(folders, key=_began)]


def _began(path: Path) -> tuple[float, str]:
    return (path / "recipe.yaml").stat().st_mtime, path.name
