"""Whoever is told how training goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from at_smooth.exceptions import DivergedError
from at_smooth.measuring import Row

if TYPE_CHECKING:
    from at_smooth.engine import Engine


class Observer:
    """Told how training goes; the run directory and the progress bar are both such."""

    def started(self, engine: Engine) -> None:
        """Training begins, or continues after a resume."""

    def stepped(self, engine: Engine) -> None:
        """One update is done; between two of them ``engine.state()`` is whole."""

    def measured(self, engine: Engine) -> None:
        """One batch of a measurement, or of the pass for BatchNorm statistics, is done; likewise."""

    def diverged(self, engine: Engine, error: DivergedError) -> None:
        """Something is not finite; training ends here, or goes back to the beginning of the epoch."""

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        """One epoch is done and measured; ``improved`` names the weights (raw, smoothed) that are the best so far."""

    def finished(self, engine: Engine) -> None:
        """Training is over."""
