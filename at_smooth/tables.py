"""A table of words: for the terminal, as Markdown or LaTeX (booktabs)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from at_smooth.exceptions import InputError
from at_smooth.output import printable

#: What has a meaning of its own in LaTeX, and what lacks in its usual fonts.
_TEX = {
    "\\": r"\textbackslash{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "\N{EN DASH}": "--",
}


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        title: What it shows.
        columns: Their names.
        rows: A cell a column.
        notes: What its signs and columns mean, a sentence each, without the full stop.
        words: Which columns hold words, and stand at the left; figures stand at the right.
        marked: Cells to be noticed, as (row, column).
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: tuple[int, ...] = (0,)
    marked: frozenset[tuple[int, int]] = frozenset()

    def formatted(self, style: str) -> str:
        """As ``markdown`` or ``latex``.

        Raises:
            InputError: There is no such style.
        """
        if style == "markdown":
            return self._markdown()
        if style == "latex":
            return self._latex()
        raise InputError(f"there is no table format '{style}'. Formats: text, markdown, latex, csv.")

    def rich(self) -> Any:
        """For a terminal."""
        from rich import box
        from rich.table import Table as Listing
        from rich.text import Text

        table = Listing(title=Text(self.title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
                        collapse_padding=True)  # fmt: skip
        for number, column in enumerate(self.columns):
            words = number in self.words
            table.add_column(Text(printable(column)), justify="left" if words else "right", overflow="fold")
        for row in self.rows:  # what belongs to a figure goes below it: wide figures exceed 80 columns
            cells = [
                cell if number in self.words else cell.replace(" ± ", "\n± ").replace(" (", "\n(")
                for number, cell in enumerate(row)
            ]
            table.add_row(*(Text(printable(cell)) for cell in cells))
        table.caption = Text("\n".join(self.notes), style="dim") if self.notes else None
        table.caption_justify = "left"
        return table

    def _markdown(self) -> str:
        rule = ["---" if number in self.words else "---:" for number, _ in enumerate(self.columns)]
        lines = [" | ".join(map(markdown_cell, line)) for line in (self.columns, rule, *self.rows)]
        notes = ["", *(f"{note}." for note in self.notes)] if self.notes else []
        return "\n".join([*(f"| {line} |" for line in lines), *notes])

    def _latex(self) -> str:
        columns = "".join("l" if number in self.words else "r" for number, _ in enumerate(self.columns))
        lines = [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(tex, self.columns)) + r" \\",
            r"\midrule",
            *(" & ".join(map(tex, row)) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {tex(note)}." for note in self.notes),  # sentences for a caption; a cell would be as wide as they are
        ]
        return "\n".join(lines)


def tex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def markdown_cell(text: str) -> str:
    """Text as Markdown shows it in a cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", r"\|").replace("<", "&lt;")
