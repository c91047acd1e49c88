"""Moments at which an interruption is welcome: a training saves itself and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from at_smooth.engine import Engine, Observer
from at_smooth.exceptions import Interrupted
from at_smooth.interruption import SIGNALS


class Stopper(Observer):
    """Ends a training on SIGINT or SIGTERM at the next moment at which its state is whole, saved.

    From the first step to the end a signal is noted, and heard after the step or the measured batch in hand. A second
    one is not kept waiting: it goes where it would have gone without this.

    Args:
        save: Saves the engine's state.
    """

    def __init__(self, save: Callable[[Engine], None]) -> None:
        self._save = save
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_go()

    def started(self, engine: Engine) -> None:
        """Note signals from here on."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def stepped(self, engine: Engine) -> None:
        """Save and stop, if a signal came."""
        self._heed(engine)

    def measured(self, engine: Engine) -> None:
        """Likewise."""
        self._heed(engine)

    def finished(self, engine: Engine) -> None:
        """Nothing is left to save."""
        self._let_go()
        if self._came is not None:
            os.kill(os.getpid(), self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._let_go()
            os.kill(os.getpid(), number)
        self._came = number

    def _heed(self, engine: Engine) -> None:
        if self._came is not None:
            self._save(engine)
            raise Interrupted(self._came, f"stopped {engine.where()}, and saved", saved=True)

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
