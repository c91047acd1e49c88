"""The console of all commands.

Names of runs, labels, classes and plugins, and what plugins say, are text of others. None of it is markup, and no
control character in it reaches a terminal. Our own emphasis is styled :class:`rich.text.Text`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from at_smooth.output import printable


class Console(RichConsole):
    """A console for which no text is markup, and that shows control characters in a text instead of sending them.

    Args:
        options: As for :class:`rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text with nothing in it that controls a terminal, before it is measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Turn anything printable into text with styles; rich's own control codes are apart from the text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
