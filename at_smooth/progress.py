"""How a run tells people where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from at_smooth.engine import Engine
from at_smooth.exceptions import DivergedError
from at_smooth.measuring import Row
from at_smooth.observer import Observer
from at_smooth.recipe import Recipe
from at_smooth.terminal import Console


class Progress(Protocol):
    """Whoever wants to know."""

    def phase(self, role: str, recipe: Recipe, path: Path) -> AbstractContextManager[Observer]:
        """One training begins: of the student, or of a teacher."""
        ...  # pragma: no cover

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...  # pragma: no cover


class Silent:
    """Tells nobody."""

    def note(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def phase(self, role: str, recipe: Recipe, path: Path) -> Iterator[Observer]:
        """Nothing."""
        yield Observer()


class Terminal:
    """A bar for each training; where output is no terminal, a line now and then.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def phase(self, role: str, recipe: Recipe, path: Path) -> Iterator[Observer]:
        """Show one training."""
        if not self._console.is_terminal:
            yield _Lines(self._console, role)
            return
        bars = Bars(
            TextColumn("{task.description:<16}", style="bold", markup=False),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", style="default", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        try:
            yield _Bar(self._console, bars, role)
        finally:
            bars.stop()


class _Bar(Observer):
    def __init__(self, console: Console, bars: Bars, role: str) -> None:
        self._console = console
        self._bars = bars
        self._role = role
        self._task = bars.add_task(role, total=None, figures="")

    def started(self, engine: Engine) -> None:
        self._bars.start()
        self._bars.update(self._task, total=engine.settings.epochs, completed=len(engine.history))

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        self._bars.update(self._task, completed=engine.epoch, figures=figures(engine, row))

    def diverged(self, engine: Engine, error: DivergedError) -> None:
        _tell_of_retry(self._console, self._role, engine, error)


class _Lines(Observer):
    def __init__(self, console: Console, role: str) -> None:
        self._console = console
        self._role = role
        self._began = time.perf_counter()
        self._first = 0

    def started(self, engine: Engine) -> None:
        self._began, self._first = time.perf_counter(), len(engine.history)

    def diverged(self, engine: Engine, error: DivergedError) -> None:
        _tell_of_retry(self._console, self._role, engine, error)

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        tenth = max(1, engine.settings.epochs // 10)
        if engine.epoch % tenth and engine.epoch != engine.settings.epochs:
            return
        done = engine.epoch - self._first
        left = (time.perf_counter() - self._began) / done * (engine.settings.epochs - engine.epoch)
        self._console.print(
            f"{self._role}: epoch {engine.epoch}/{engine.settings.epochs}  {figures(engine, row)}  left {left:.0f} s",
        )


def _tell_of_retry(console: Console, role: str, engine: Engine, error: DivergedError) -> None:
    if engine.may_go_back:
        what = f"{role}: {error} Back to the beginning of the epoch, with half the learning rate."
        console.print(what, soft_wrap=True)


def figures(engine: Engine, row: Row) -> str:
    """The epoch's loss and validation accuracies in percent, of the smoothed model where there is one."""
    prefix = "smoothed_" if row["smoothed_val_ra"] is not None else ""
    text = f"loss {row['train_loss']:.3f}"
    sa, ra = row[f"{prefix}val_sa"], row[f"{prefix}val_ra"]
    return text if sa is None or ra is None else f"{text}  val SA {sa:.1f} RA {ra:.1f}"
