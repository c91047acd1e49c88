"""Moments at which an interruption has to wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def put_back(before: Mapping[int, Any]) -> None:
    """Give signals the handlers that they had before, unless they are ignored by now."""
    for number, handler in before.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM for good, whoever waits to give them their handlers back."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let SIGINT end this process at once and without words while the block waits, unless somebody else handles it.

    Python's own handler would end it with a traceback, and where the block waits in C++ only after it.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != usual:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while the block runs, and deliver them when it ends.

    An exception out of a signal's handler would break a library in the middle of its work: ``torch.save`` turns it
    into an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])
