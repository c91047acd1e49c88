"""What people should know although nothing stops: a Python warning, or a line that the command prints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_printers: list[Callable[[str], None]] = []


class AtSmoothWarning(UserWarning):
    """Something about data, a model or a plugin that is allowed and may not be meant."""


def notify(text: str) -> None:
    """Tell the user something that stops nothing.

    The command prints ``note: TEXT`` on standard error, each text once. In Python it is an :class:`AtSmoothWarning` at
    the line outside of at-smooth that led here.

    Args:
        text: What there is, with its value, and what to do if it is not meant.
    """
    if _printers:
        _printers[-1](text)
    else:
        warnings.warn(text, AtSmoothWarning, stacklevel=_depth_of_caller())


@contextmanager
def printed_by(printer: Callable[[str], None]) -> Iterator[None]:
    """Hand what is notified to a printer, each text once, in place of warning of it."""
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            printer(text)

    _printers.append(once)
    try:
        yield
    finally:
        _printers.pop()


def _depth_of_caller() -> int:
    """How far up the stack, seen from :func:`notify`, the first frame outside of at-smooth and its plugins is."""
    depth, frame = 1, sys._getframe(1)  # notify
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("at_smooth"):
        depth, frame = depth + 1, frame.f_back
    return depth
