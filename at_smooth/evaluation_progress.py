"""How an evaluation tells people where it is: examples done, how many stand, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from at_smooth.evaluation import Watcher
from at_smooth.interfaces import Outcome
from at_smooth.terminal import Console

_SECONDS_BETWEEN_LINES = 10


@contextmanager
def shown(console: Console) -> Iterator[Watcher]:
    """A bar while an evaluation runs; where output is no terminal, a line now and then."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bar(bars)


class _Bar(Watcher):
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, figures="")

    def stage_began(self, evaluator: str, stage: str, examples: int) -> None:
        self._bars.reset(self._task, description=f"{evaluator}, {stage}", total=examples, figures="")

    def batch_done(self, examples: int, accuracy: float | None = None) -> None:
        self._bars.update(self._task, advance=examples, figures=_standing(accuracy))


class _Lines(Watcher):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._spoke = time.monotonic()
        self._stage, self._done, self._total = "", 0, 0

    def stage_began(self, evaluator: str, stage: str, examples: int) -> None:
        self._stage, self._done, self._total = f"{evaluator}, {stage}", 0, examples
        self._began = self._spoke = time.monotonic()

    def batch_done(self, examples: int, accuracy: float | None = None) -> None:
        self._done += examples
        now = time.monotonic()
        if now - self._spoke < _SECONDS_BETWEEN_LINES or self._done == self._total:
            return
        self._spoke = now
        left = (now - self._began) / self._done * (self._total - self._done)
        self._say(f"{self._stage}: {self._done}/{self._total}  {_standing(accuracy)}  left {left:.0f} s")

    def evaluator_done(self, evaluator: str, outcome: Outcome) -> None:
        n = len(outcome.broken_by)
        self._say(f"{evaluator}: {n}/{n}  {outcome.accuracy:.1f} % stand  {outcome.seconds:.1f} s")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def _standing(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.1f} % stand"
