"""Curves as text: in braille where the terminal has colours to tell them apart, else a letter a curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

_BLANK_BRAILLE = 0x2800
#: The bit of each dot of a braille character, by column and row from the top.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_MARGIN = 5  # characters, for the numbers of the y axis


@dataclass(frozen=True)
class Curve:
    """What is drawn.

    Attributes:
        letter: Its sign where there is no braille.
        style: Its colour, as rich has it.
        points: (x, y), x rising.
    """

    letter: str
    style: str
    points: Sequence[tuple[float, float]]


def plot(
    curves: Sequence[Curve],
    width: int,
    height: int,
    x: tuple[float, float],
    marks: Sequence[float] = (),
    braille: bool = True,
) -> Text:
    """Curves over a common x axis, the later in front; the y axis fits them, to whole tens.

    Args:
        curves: At least one point in all.
        width: Of the text, axes and all, in characters.
        height: Likewise, in lines.
        x: From where to where.
        marks: Where to draw a vertical line.
        braille: Whether characters beyond ASCII may be used.
    """
    values = [value for curve in curves for _, value in curve.points]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    high = max(high, low + 10)
    columns, lines = max(2, width - _MARGIN - 1), max(2, height - 2)
    across, down = (2 * columns, 4 * lines) if braille else (columns, lines)
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    span = max(x[1] - x[0], 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] - x[0]) / span * (across - 1), (high - point[1]) / (high - low) * (down - 1)

    for mark in marks:
        column = round(place((mark, low))[0]) // (2 if braille else 1)
        if 0 < column < columns:
            cells.update({(column, line): ("┊" if braille else ":", "dim") for line in range(lines)})
    for curve in curves:
        for column, line in _path([place(point) for point in curve.points if x[0] <= point[0] <= x[1]]):
            if not braille:
                cells[column, line] = (curve.letter, curve.style)
                continue
            cell = (column // 2, line // 4)
            before = ord(cells[cell][0]) if cell in cells else 0
            before = before if before >= _BLANK_BRAILLE else _BLANK_BRAILLE
            cells[cell] = (chr(before | _DOTS[column % 2][line % 4]), curve.style)
    text = Text(no_wrap=True)
    axis = "│" if braille else "|"
    for line in range(lines):
        value = high - (high - low) * line / (lines - 1)
        labelled = line in (0, lines - 1, lines // 2)
        text.append(f"{value:>{_MARGIN - 1}.0f} " if labelled else " " * _MARGIN, "dim").append(axis, "dim")
        for column in range(columns):
            text.append(*cells.get((column, line), (" ", "")))
        text.append("\n")
    text.append(" " * _MARGIN + ("└" + "─" * columns if braille else "+" + "-" * columns) + "\n", "dim")
    first, last = f"{x[0]:g}", f"epoch {x[1]:g}"
    text.append(" " * (_MARGIN + 1) + first + last.rjust(columns - len(first)), "dim")
    return text


def _path(points: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """The dots on the lines from point to point."""
    if len(points) == 1:
        yield round(points[0][0]), round(points[0][1])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        steps = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        for step in range(steps + 1):
            yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
