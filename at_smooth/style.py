"""How figures look: sizes, fonts, and one colour a setting, the same in every figure.

Which settings have a colour of their own is data: a file ``styles.yaml`` among the recipes of any distribution gives
it, a line ``label: {colour, marker, line}`` a setting, where the label is that of the tables. What no file names gets
one that follows from its label alone.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from at_smooth import registry
from at_smooth.reading import yaml_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

#: Widths of a figure in a paper of two columns, in inches.
COLUMN, DOUBLE = 3.3, 6.9

#: The height of a page, likewise; no figure should be taller.
PAGE = 8.6

#: Where colours are declared, beside the recipes of a distribution.
STYLES = "styles.yaml"

#: Okabe and Ito's colours (jfly.uni-koeln.de/color), which most colour-blind people tell apart, but for the yellow,
#: which is pale on white.
PALETTE = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "black": "#000000",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "orange": "#E69F00",
    "grey": "#7F7F7F",
}

#: Further ones for settings that nobody declared (after Tol's "muted" scheme).
FURTHER = ("#882255", "#999933", "#332288", "#44AA99", "#CC6677", "#661100")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")

_RC: Any = {
    "text.usetex": False,  # LaTeX reads files, and runs programs where it is set up so; labels come from files
    "font.family": "sans-serif",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "patch.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.03,
}


@dataclass(frozen=True)
class Style:
    """How one setting looks.

    Attributes:
        colour: As ``#rrggbb``.
        marker: As matplotlib has it.
        line: Likewise.
    """

    colour: str
    marker: str
    line: str = "-"


def style_of(label: str) -> Style:
    """The look of a setting, from its label alone: the same in every figure, on every machine.

    What stands in parentheses at the label's end is a detail and does not change the look; see :func:`styles_of`.

    Args:
        label: As the tables word it, such as ``at + swa`` or ``at + swa (eps=0.1)``.
    """
    base = label.partition(" (")[0]
    declared = _declared()
    if base in declared:
        return declared[base]
    number = zlib.crc32(base.encode())
    return Style(FURTHER[number % len(FURTHER)], _MARKERS[number // 7 % len(_MARKERS)], _LINES[number // 61 % 3])


def styles_of(labels: Iterable[str]) -> dict[str, Style]:
    """The look of each setting in one figure, no two alike.

    The first of several that would look the same keeps its look; the others take a colour, a marker and a line that
    are free.
    """
    chosen: dict[str, Style] = {}
    labels = list(dict.fromkeys(labels))
    reserved = {style_of(label).colour for label in labels}
    for label in labels:
        style, taken = style_of(label), {each.colour for each in chosen.values()}
        if style.colour in taken:
            free = [colour for colour in (*FURTHER, *PALETTE.values()) if colour not in taken | reserved]
            markers = [marker for marker in _MARKERS if marker not in {each.marker for each in chosen.values()}]
            style = replace(
                style,
                colour=free[0] if free else style.colour,
                marker=markers[0] if markers else style.marker,
                line=_LINES[len(chosen) % len(_LINES)],
            )
        chosen[label] = style
    return chosen


def paper_style() -> AbstractContextManager[None]:
    """A block in which matplotlib draws with our fonts and lines; its own settings are back afterwards."""
    import matplotlib

    return matplotlib.rc_context(_RC)


def new_figure(width: float = COLUMN, height: float = 2.3) -> Figure:
    """An empty figure that no global state knows of, so that nobody has to close it.

    Args:
        width: In inches, :data:`COLUMN` or :data:`DOUBLE`.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a pair of dollar signs in a name begins no formula."""
    return text.replace("$", r"\$")


def legend_above(figure: Figure, columns: int | None = None) -> None:
    """A legend over all panels, where it covers no data.

    Args:
        figure: Whose axes have labelled artists; each label is shown once.
        columns: How many; None for as many as the width has room for.
    """
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    if columns is None:
        longest = max(len(line) for label in found for line in label.splitlines())
        entry = 0.36 + 0.052 * longest  # inches: the handle and the gap, and a character
        room = max(1, min(len(found), int(figure.get_figwidth() / entry)))
        columns = math.ceil(len(found) / math.ceil(len(found) / room))
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns)


def as_png(figure: Figure, dpi: int = 300) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    return _saved(figure, "png", dpi=dpi, metadata={"Software": None})


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, its words as words; the same figure gives the same bytes."""
    return _saved(figure, "svg", metadata={"Date": None})


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({**_RC, "svg.fonttype": "none", "svg.hashsalt": "at-smooth"}):
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


@cache
def _declared() -> dict[str, Style]:
    """The settings with a look of their own, of all distributions; of two that claim one the first counts."""
    declared: dict[str, Style] = {}
    for entry in registry.entries(registry.RECIPES):
        with suppress(Exception):  # a colour is no reason to fail: whatever is wrong there, its settings get another
            content = yaml_of(resources.files(entry.target) / STYLES)
            for label, look in content.items():
                colour = PALETTE.get(look["colour"], look["colour"])
                declared.setdefault(label, Style(colour, look.get("marker", "o"), look.get("line", "-")))
    return declared
