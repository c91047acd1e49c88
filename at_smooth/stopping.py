"""Moments at which an interruption is welcome: a training saves itself and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from at_smooth.early_words import launcher_died
from at_smooth.engine import Engine
from at_smooth.exceptions import Interrupted
from at_smooth.interruption import SIGNALS, put_back
from at_smooth.observer import Observer
from at_smooth.ranks import Ranks


class Stopper(Observer):
    """Ends a training on SIGINT or SIGTERM at the next moment at which its state is whole, saved.

    From the first step to the end a signal is noted, and heard after the step or the measured batch in hand. A second
    one is not kept waiting: it goes where it would have gone without this.

    Several ranks stop together, after the same step, whoever of them got a signal. A second one changes nothing then:
    torchrun sends it to every process that a Ctrl-C has reached already. Where torchrun itself is gone, killed, they
    stop as by SIGTERM.

    Args:
        save: Saves the engine's state; called on every rank.
    """

    def __init__(self, save: Callable[[Engine], None]) -> None:
        self._save = save
        self._came: int | None = None
        self._ranks = Ranks()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_go()

    def started(self, engine: Engine) -> None:
        """Note signals from here on."""
        self._ranks = engine.runtime.ranks
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
        came = self._ranks.largest(self._came or 0)
        self._let_go()
        if came:
            os.kill(os.getpid(), came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None and self._ranks.count == 1:
            self._let_go()
            os.kill(os.getpid(), number)
        self._came = number

    def _heed(self, engine: Engine) -> None:
        came = self._agreed()
        if came:
            self._save(engine)
            self._ranks.wait()  # until the first has saved: torchrun ends all when one has ended
            why = "torchrun is gone; " if launcher_died() else ""
            raise Interrupted(came, f"{why}stopped {engine.where()}, and saved", saved=True)

    def _agreed(self) -> int:
        """The signal that came to any rank, or 0."""
        return self._ranks.largest(self._came or (signal.SIGTERM if launcher_died() else 0))

    def _let_go(self) -> None:
        put_back(self._before)
        self._before = {}
