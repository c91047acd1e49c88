"""Whoever draws figures of finished runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from at_smooth.interfaces.plugin import Plugin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from at_smooth.run import Run


@dataclass(frozen=True)
class Study:
    """What an analysis found.

    Attributes:
        figure: What it drew.
        tables: The numbers behind the figure, by name: rows of plain values, each row with the same keys.
    """

    figure: Figure
    tables: Mapping[str, list[dict[str, Any]]]


class Analysis(Plugin):
    """Draws a figure from finished runs, and gives the numbers behind it."""

    @abstractmethod
    def study(self, runs: Sequence[Run]) -> Study:
        """Look at runs.

        Args:
            runs: At least one; each has its recipe, its history and its checkpoints.

        Raises:
            InputError: It needs more of them, or other ones; the message says which.
        """
