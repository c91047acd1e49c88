"""Robust overfitting at a glance: every setting's decline, and what each remedy recovers of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from at_smooth.grouping import REMEDIES, by_setting, recorded, setting, tested_on
from at_smooth.overfitting import Decline, Weights, decline_in
from at_smooth.run import Run
from at_smooth.tables import Table


@dataclass(frozen=True)
class Figure:
    """A mean over runs, with their standard deviation where there are several."""

    mean: float
    sd: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """None where there are no values."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Seen:
    """What the runs of one setting show, of one kind of weights.

    Attributes:
        label: The setting.
        weights: Which weights.
        declines: One of each run.
        is_baseline: Whether this is what the remedies are set against.
        recovered: The share of the baseline's fall that the remedy prevents, in percent; None where the baseline is not
            among the runs, or does not decline.
        regained: By how many points its last five epochs are above the baseline's; runs of the same seed are paired.
    """

    label: str
    weights: Weights
    declines: list[Decline]
    is_baseline: bool
    recovered: float | None = None
    regained: Figure | None = None

    def mean(self, name: Literal["peak", "last", "fall", "slope", "onset", "since_drop"]) -> Figure | None:
        """One figure of the runs, of those that have it."""
        return Figure.of([value for decline in self.declines if (value := getattr(decline, name)) is not None])

    @property
    def falling(self) -> list[Decline]:
        """Those that decline."""
        return [decline for decline in self.declines if decline.verdict == "declines"]


def at_a_glance(runs: Sequence[Run]) -> list[Seen]:
    """Every setting, raw weights and smoothed, and what each remedy recovers of its baseline's fall.

    A setting's baseline is the one that differs from it in regularizer and smoother alone, and has neither.

    Args:
        runs: Finished or not. An unfinished one counts where its setting has none that is finished, as of its last
            epoch, and the label says so.
    """
    groups = [_finished(label, group) for label, group in by_setting(runs)]
    baselines = [
        group for _, group in groups if all(recorded(group[0])[field] == neutral for field, neutral in REMEDIES.items())
    ]
    seen = []
    for label, group in groups:
        baseline = next((other for other in baselines if _differ_in_remedies_alone(group, other)), None)
        for weights in ("raw", "smoothed"):
            found = {run: decline for run in group if (decline := decline_in(run, weights))}
            if not found:
                continue
            own = baseline is group
            recovered, regained = (None, None) if own or not baseline else _compared(found, baseline)
            seen.append(Seen(label, weights, list(found.values()), own, recovered, regained))
    return seen


def _finished(label: str, group: list[Run]) -> tuple[str, list[Run]]:
    finished = [run for run in group if run.finished]
    return (label, finished) if finished else (f"{label}, not finished", group)


def _compared(found: dict[Run, Decline], baseline: Sequence[Run]) -> tuple[float | None, Figure | None]:
    """What a remedy recovers of the fall of a baseline, and the RA that it regains."""
    theirs = {recorded(run).get("seed"): decline for run in baseline if (decline := decline_in(run, "raw"))}
    part = next(iter(found.values())).part
    usual = Figure.of([other.last for other in theirs.values() if other.last is not None and other.part == part])
    if usual is None:
        return None, None
    regained = []
    for run, decline in found.items():
        twin = theirs.get(recorded(run).get("seed"))
        if decline.last is not None:
            regained.append(decline.last - (twin.last if twin and twin.last is not None else usual.mean))
    own_fall = Figure.of([decline.fall for decline in found.values() if decline.fall is not None])
    fall = Figure.of([other.fall for other in theirs.values() if other.fall is not None])
    falls = sum(other.verdict == "declines" for other in theirs.values()) * 2 > len(theirs)
    recovered = 100 * (fall.mean - own_fall.mean) / fall.mean if falls and fall and own_fall and fall.mean > 0 else None
    return recovered, Figure.of(regained)


def _differ_in_remedies_alone(group: Sequence[Run], other: Sequence[Run]) -> bool:
    """Whether two settings share all but regularizer and smoother; their test images too, as far as these are known."""
    images = {digest for each in (group, other) for run in each if (digest := tested_on(run))}
    return len(images) < 2 and _without_remedies(recorded(group[0])) == _without_remedies(recorded(other[0]))


def _without_remedies(recipe: dict[str, Any]) -> str:
    return setting(recipe, [name for field in REMEDIES for name in (field, f"{field}_options")])


_COLUMNS = ["setting", "RA peak", "last five", "fall", "onset", "per 10 epochs", "recovers", "regained"]


def table(seen: Sequence[Seen]) -> Table:
    """What was seen, in words and percent."""
    both = {each.label for each in seen if each.weights == "smoothed"}
    rows = [
        [
            each.label
            + (f", {each.weights}" if each.label in both else "")
            + (f" ({len(each.declines)} runs)" if len(each.declines) > 1 else ""),
            _cell(each.mean("peak")),
            _last_five(each),
            _cell(each.mean("fall")),
            _onset(each),
            _cell(_tenfold(each.mean("slope")), "+"),
            "baseline" if each.is_baseline else "-" if each.recovered is None else f"{each.recovered:.0f} %",
            _cell(each.regained, "+"),
        ]
        for each in seen
    ]
    notes = [
        "RA peak: the highest of its running median over five epochs, whichever epoch validation picks; last five: "
        "mean and standard deviation of the last five epochs, or over the seeds; fall: peak less last five",
        "onset: the last epoch with RA within noise of its peak; in parentheses the last drop of the learning rate and "
        "the epochs since; per 10 epochs: how fast RA falls from there",
        "recovers: the share of the baseline's fall that is prevented; regained: RA above the baseline's last five",
    ]
    if any(decline.part == "val" for each in seen for decline in each.declines):
        notes.append("where the test set was not measured, RA is that on the validation set")
    return Table("robust overfitting at a glance, percent", _COLUMNS, rows, notes)


def figures(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """The same run by run, every figure in full."""
    return [
        {
            "setting": each.label,
            "weights": each.weights,
            "run": number,
            "part": decline.part,
            "RA peak": decline.peak,
            "last five": decline.last,
            "last five sd": decline.last_sd,
            "fall": decline.fall,
            "noise": decline.noise,
            "verdict": decline.verdict,
            "onset": decline.onset,
            "drop": decline.drop,
            "epochs since drop": decline.since_drop,
            "points per epoch": decline.slope,
            "setting recovers": each.recovered,
            "setting regains RA": each.regained.mean if each.regained else None,
            "setting regains RA sd": each.regained.sd if each.regained else None,
            "RA at best val": decline.best,
            "epoch of best val": decline.best_epoch,
        }
        for each in seen
        for number, decline in enumerate(each.declines, start=1)
    ]


def _cell(figure: Figure | None, sign: Literal["+", ""] = "") -> str:
    if figure is None:
        return "-"
    return f"{figure.mean:{sign}.2f}" + ("" if figure.sd is None else f" ± {figure.sd:.2f}")


def _last_five(each: Seen) -> str:
    if len(each.declines) > 1 or each.declines[0].last is None:
        return _cell(each.mean("last"))
    return _cell(Figure(each.declines[0].last, each.declines[0].last_sd))


def _tenfold(slope: Figure | None) -> Figure | None:
    return slope and Figure(10 * slope.mean, None if slope.sd is None else 10 * slope.sd)


def _onset(each: Seen) -> str:
    """When the decline begins; over several runs, between which epochs and in how many."""
    falling = each.falling
    if not falling:
        verdicts = {decline.verdict for decline in each.declines}
        return "none" if verdicts == {"no decline"} else "too few epochs"
    words = _range([decline.onset for decline in falling])
    drops = {decline.drop for decline in falling}
    if len(drops) == 1 and None not in drops:
        words += f" ({drops.pop()} + {_range([decline.since_drop for decline in falling])})"
    return words + (f" ({len(falling)} of {len(each.declines)})" if len(each.declines) > 1 else "")


def _range(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return str(known[0]) if min(known) == max(known) else f"{min(known)}\N{EN DASH}{max(known)}"
