"""Robust overfitting in a history: when RA begins to decline, and how far it falls.

The terms:

- **noise**: how much one measurement scatters from epoch to epoch, as a standard deviation. It is estimated from the
  distance of each measurement to the line through its two neighbours (Gasser, Sroka and Jennen-Steinmetz, Biometrika
  1986), by their median, so that neither a slow decline nor a drop of the learning rate counts as noise.
- **smoothed RA**: the median of the measurements within two epochs on either side. (Smoothed over epochs; whether the
  weights are averaged is another matter.)
- **peak**: the maximum of the smoothed RA.
- **fall**: the peak less the mean of the last five epochs.
- **decline**: a fall of more than three times the noise, and of at least one percentage point. On a flat history of 80
  epochs chance alone makes fewer than one in a hundred such.
- **onset**: the last epoch at which the smoothed RA is within twice the noise of its peak; from then on it stays
  below. The slower the decline, the later it shows above the noise. Without noise the onset is exact to the two epochs
  of the smoothing.

The best epoch *by validation*, which the tables of best, final and diff report, is none of these: validation may pick
an epoch before or after the peak, so that a run that declines can still end above it.

All of this is about one test set, the same in each epoch; how far another one would differ is in the intervals of the
tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from at_smooth.exceptions import explain
from at_smooth.following import history_so_far
from at_smooth.grouping import recorded
from at_smooth.measuring import Row
from at_smooth.run import Run
from at_smooth.settings import Settings

Weights = Literal["raw", "smoothed"]
Verdict = Literal["declines", "no decline", "too few measurements"]
Points = list[tuple[int, float]]

#: Fewer measurements than this say nothing of a trend.
LEAST_MEASUREMENTS = 8
#: The least fall that is called a decline, in percentage points.
LEAST_FALL = 1.0

_WITHIN = 2.0  # times the noise: still at the maximum
_BEYOND = 3.0  # times the noise: a decline
_REACH = 2  # epochs on either side
_LAST = 5  # epochs, as in the paper

_PREFIX: dict[str, str] = {"raw": "", "smoothed": "smoothed_"}


@dataclass(frozen=True)
class Decline:
    """What the history of one run shows, in percent and in epochs.

    Attributes:
        part: Whether RA is of the test set or, where that was never looked at, of the validation set.
        peak: The maximum of the smoothed RA; None where nothing was measured.
        best: RA of the best epoch by validation; None where it was not measured.
        best_epoch: That epoch.
        last: Mean of what was measured in the last five epochs.
        last_sd: Its standard deviation.
        noise: See above; None for too few measurements.
        verdict: Whether RA declines.
        onset: When the decline begins; None where there is none.
        drop: After which epoch the learning rate dropped for the last time before the onset.
        slope: The line fitted from the onset on, in percentage points an epoch.
    """

    part: Literal["test", "val"]
    peak: float | None
    best: float | None
    best_epoch: int | None
    last: float | None
    last_sd: float | None
    noise: float | None
    verdict: Verdict
    onset: int | None = None
    drop: int | None = None
    slope: float | None = None

    @property
    def fall(self) -> float | None:
        """The peak less the mean of the last five epochs."""
        return None if self.peak is None or self.last is None else self.peak - self.last

    @property
    def since_drop(self) -> int | None:
        """How many epochs after that drop the decline begins."""
        return None if self.onset is None or self.drop is None else self.onset - self.drop


def decline_of(
    history: Sequence[Row],
    drops: Sequence[int] = (),
    weights: Weights = "raw",
    best: tuple[int, float] | None = None,
) -> Decline:
    """Look at a history.

    Args:
        history: A row an epoch, in order; what was not measured is None.
        drops: After how many epochs the learning rate drops.
        weights: Whose RA.
        best: The best epoch by validation and its RA, where known better than from the history, which may lack the
            test figures of that epoch.
    """
    prefix = _PREFIX[weights]
    part: Literal["test", "val"] = "test" if _points(history, f"{prefix}test_ra") else "val"
    column, by = f"{prefix}{part}_ra", f"{prefix}val_ra"
    points = _points(history, column)
    if best is None or part == "val":
        measured = [row for row in history if _is_number(row[column]) and _is_number(row[by])]
        row = max(measured, key=lambda row: float(row[by] or 0), default=None)  # the first of equals, as in training
        best = (int(row["epoch"] or 0), float(row[column] or 0)) if row else None
    last = [value for _, value in _points(history[-_LAST:], column)]
    curve = _running_median(points)
    facts: dict[str, Any] = {
        "part": part,
        "peak": max((value for _, value in curve), default=None),
        "best": best[1] if best else None,
        "best_epoch": best[0] if best else None,
        "last": statistics.fmean(last) if last else None,
        "last_sd": statistics.stdev(last) if len(last) > 1 else None,
    }
    if len(points) < LEAST_MEASUREMENTS or not last:
        return Decline(**facts, noise=None, verdict="too few measurements")
    noise, peak = _noise(points), facts["peak"]
    if peak - facts["last"] < max(LEAST_FALL, _BEYOND * noise):
        return Decline(**facts, noise=noise, verdict="no decline")
    onset = max(epoch for epoch, value in curve if value >= peak - _WITHIN * noise)
    return Decline(
        **facts,
        noise=noise,
        verdict="declines",
        onset=onset,
        drop=max((drop for drop in drops if drop < onset), default=None),
        slope=_slope([point for point in points if point[0] >= onset]),
    )


def decline_in(run: Run, weights: Weights) -> Decline | None:
    """What a run's history shows; None where it has no such weights, or no epoch is done."""
    history = history_so_far(run)
    if not any(_is_number(row[f"{_PREFIX[weights]}{part}_ra"]) for row in history for part in ("val", "test")):
        return None
    best = None
    if run.finished and (block := run.summary[weights]) and block["best"]["test_ra"] is not None:
        best = (block["best"]["epoch"], block["best"]["test_ra"])
    return decline_of(history, drops_of(recorded(run)), weights, best)


def drops_of(recipe: dict[str, Any]) -> list[int]:
    """After how many epochs the learning rate drops under a recorded recipe.

    Raises:
        OptionError: It has no such schedule.
    """
    known = {name: recipe[name] for name in ("epochs", "lr_schedule", "milestones") if name in recipe}
    try:
        return Settings(**known).decays()
    except ValidationError as error:
        raise explain(error, "the recipe of a run") from None


def _points(history: Sequence[Row], column: str) -> Points:
    return [(int(row["epoch"] or 0), float(row[column] or 0)) for row in history if _is_number(row[column])]


def _is_number(value: float | None) -> bool:
    return value is not None and value == value  # not blank, not NaN


def _noise(points: Points) -> float:
    scaled: list[float] = []
    for (before, left), (here, value), (after, right) in zip(points, points[1:], points[2:], strict=False):
        share = (after - here) / (after - before)
        distance = abs(share * left + (1 - share) * right - value)
        scaled.append(distance / (share**2 + (1 - share) ** 2 + 1) ** 0.5)
    return 1.4826 * statistics.median(scaled)  # the median distance of a normal variable, as its standard deviation


def _running_median(points: Points) -> Points:
    return [
        (here, statistics.median(value for epoch, value in points if abs(epoch - here) <= _REACH)) for here, _ in points
    ]


def _slope(points: Points) -> float | None:
    if len(points) < 2:
        return None
    slope: float = statistics.linear_regression(*zip(*points, strict=True)).slope
    return slope
