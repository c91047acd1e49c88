"""A run while it is going on: its curves, how far it is, how long it will take, in a terminal."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable

from rich.live import Live
from rich.text import Text

from at_smooth.following import Progress, history_so_far, teachers_of
from at_smooth.grouping import REMEDIES, recorded
from at_smooth.lock import NAME as LOCK
from at_smooth.measuring import Row
from at_smooth.overfitting import drops_of
from at_smooth.report_sections import duration
from at_smooth.run import Run
from at_smooth.terminal import Console
from at_smooth.text_plot import Curve, plot

_MOST_COLUMNS, _MOST_LINES = 120, 32
_LEAST_EPOCHS = 10  # along the x axis, so that the first epochs do not leap about
_QUIET = 60.0  # seconds without an epoch, and three times what one takes, before the silence is mentioned

#: Prefix of its column and measure, letter, colour. RA lies in front of SA, the average in front of the raw weights.
_CURVES = {
    "SA": ("", "sa", "s", "cyan"),
    "SA smoothed": ("smoothed_", "sa", "S", "yellow"),
    "RA": ("", "ra", "r", "blue"),
    "RA smoothed": ("smoothed_", "ra", "R", "red"),
}


def follow(run: Run, console: Console, every: float = 1.0, pause: Callable[[float], None] = time.sleep) -> None:
    """Show a run until it is finished.

    In a terminal the curves are drawn again and again; elsewhere each epoch is a line.

    Args:
        run: Which.
        console: Where.
        every: Seconds between two looks.
        pause: Waits for so many seconds.
    """
    if not console.is_terminal:
        _lines(run, console, every, pause)
        return
    with Live(frame(run, console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not run.finished:
            pause(every)
            live.update(frame(run, console), refresh=True)


def frame(run: Run, console: Console) -> Text:
    """The run as it is now, on one screen."""
    going = _what_goes_on(run)
    history = history_so_far(going)
    progress = Progress.of(going, history)
    lines = [_headline(run, going), _state(going, progress, history)]
    if history:
        lines += _figures(history)
    if silence := _silence(run, going, progress):
        lines.append(silence)
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "crop"
    curves, part = _curves(history)
    if curves:
        width = min(console.width, _MOST_COLUMNS)
        height = min(console.height, _MOST_LINES) - len(lines) - 2
        text.append("\n").append(_legend(curves, part, braille := _has_braille(console))).append("\n")
        last = max(progress.epoch, min(_LEAST_EPOCHS, progress.epochs))
        shown = [curve for _, curve in curves]
        text.append(plot(shown, width, height, (1, last), drops_of(recorded(going)), braille))
    return text


def _lines(run: Run, console: Console, every: float, pause: Callable[[float], None]) -> None:
    said = {each.path: len(history_so_far(each)) for each in teachers_of(run) if each.finished}  # those from a cache
    while True:
        finished = run.finished  # asked first: what was measured until then is printed below
        for each in (*teachers_of(run), run):
            history = history_so_far(each)
            role = "" if each is run else f"teacher {each.path.name}: "
            for row in history[said.get(each.path, 0) :]:
                epoch = f"epoch {row['epoch']:.0f}/{recorded(each)['epochs']}"
                words = [_words(row, ""), *(f"smoothed {found}" for found in [_words(row, "smoothed_")] if found)]
                console.print(f"{role}{epoch}  {'  '.join(words)}".rstrip(), soft_wrap=True)
            said[each.path] = len(history)
        if finished:
            return
        pause(every)


def _what_goes_on(run: Run) -> Run:
    """The run itself, or the teacher that is being trained before it."""
    if run.finished or history_so_far(run):
        return run
    return next((teacher for teacher in reversed(teachers_of(run)) if not teacher.finished), run)


def _headline(run: Run, going: Run) -> Text:
    recipe = recorded(going)
    parts = [recipe["method"], *(recipe[field] for field in REMEDIES if recipe[field] != REMEDIES[field])]
    text = Text(" + ".join(map(str, parts)), style="bold")
    text.append(f": {recipe['model']} on {recipe['dataset']}, {run.path}", style="not bold")
    return text if going is run else Text(f"teacher {going.path.name}: ", style="magenta").append(text)


def _state(going: Run, progress: Progress, history: list[Row]) -> Text:
    if not history:
        return Text(f"no epoch is done yet, of {progress.epochs}")
    words = [f"finished, {progress.epoch} epochs" if progress.finished else f"epoch {progress.epoch}/{progress.epochs}",
             f"lr {history[-1]['lr']:.2g}"]  # fmt: skip
    if history[-1]["train_loss"] is not None:
        words.append(f"loss {history[-1]['train_loss']:.3f}")
    if progress.finished or progress.left is None:
        words.append(f"took {duration(progress.seconds)}")
    else:
        words.append(f"{progress.seconds / progress.epoch:.2g} s an epoch, about {duration(progress.left)} left")
    return Text("   ".join(words))


def _figures(history: list[Row]) -> list[Text]:
    """The newest figures, and those of the best epoch so far by validation, raw and smoothed."""
    kinds = {"": "raw", "smoothed_": "smoothed"}
    lines = [f"now   {kind:<8}  {words}" for prefix, kind in kinds.items() if (words := _words(history[-1], prefix))]
    for prefix, kind in kinds.items():
        validated = [row for row in history if row[f"{prefix}val_ra"] is not None]
        if validated:
            best = max(validated, key=lambda row: row[f"{prefix}val_ra"] or 0.0)
            lines.append(f"best  {kind:<8}  {_words(best, prefix)}  (epoch {best['epoch']:.0f})")
    return list(map(Text, lines))


def _words(row: Row, prefix: str) -> str:
    """The accuracies of an epoch."""
    measured = {part: (row[f"{prefix}{part}_ra"], row[f"{prefix}{part}_sa"]) for part in ("val", "test")}
    return "  ".join(
        f"{part} RA {ra:.1f} SA {sa:.1f}" for part, (ra, sa) in measured.items() if ra is not None and sa is not None
    )


def _curves(history: list[Row]) -> tuple[list[tuple[str, Curve]], str]:
    part = "test" if any(row["test_ra"] is not None for row in history) else "val"
    curves = []
    for name, (prefix, measure, letter, style) in _CURVES.items():
        values = [(row["epoch"], row[f"{prefix}{part}_{measure}"]) for row in history]
        points = [(float(epoch or 0), value) for epoch, value in values if value is not None]
        if points:
            curves.append((name, Curve(letter, style, points)))
    return curves, "test" if part == "test" else "validation"


def _legend(curves: list[tuple[str, Curve]], part: str, braille: bool) -> Text:
    text = Text(f"{part} accuracy, %:")
    for name, curve in curves:
        text.append("  ").append("━━ " if braille else f"{curve.letter} ", curve.style).append(name)
    return text


def _silence(run: Run, going: Run, progress: Progress) -> Text | None:
    """Whether nobody trains it, as far as can be told: a killed process leaves its lock, and looks like a slow one."""
    if run.finished:
        return None
    again = f"continue it with: at-smooth train --out {shlex.quote(str(run.path))} --resume"
    if not (run.path / LOCK).exists():
        return Text(f"not being trained; {again}", style="yellow")
    files = [path for path in (going.path / "metrics.csv", going.path / "recipe.yaml") if path.is_file()]
    quiet = time.time() - max(path.stat().st_mtime for path in files)
    usual = progress.seconds / progress.epoch if progress.epoch else 0.0
    if quiet < max(_QUIET, 3 * usual):
        return None
    return Text(f"no epoch for {duration(quiet)}; if it was killed, {again}", style="yellow")


def _has_braille(console: Console) -> bool:
    return console.encoding.lower().startswith("utf") and console.color_system is not None


def once(run: Run, console: Console) -> None:
    """Print the run as it is now."""
    console.print(frame(run, console), no_wrap=True, overflow="crop")
