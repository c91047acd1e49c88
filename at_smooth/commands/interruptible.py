"""Interruptions and failed writes while a command works: what it says then."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from at_smooth.exceptions import Interrupted, RankLostError, StorageError
from at_smooth.interruption import SIGNALS, put_back


@contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted` while the block runs, and say how to carry on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "stopped")

    before = {int(number): signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(stopped.signal_number, f"{stopped}; {advice()}") from None
    except StorageError as error:
        error.add(f"Make room, or mend what is in the way; then {advice()}")
        raise
    except RankLostError as error:
        error.add(advice()[:1].upper() + advice()[1:])
        raise
    finally:
        put_back(before)
