"""Interruptions and failed writes while a command works: what it says then."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from at_smooth.exceptions import Interrupted, RankLostError, RunDirectoryGoneError, StorageError, interruptions
from at_smooth.interruption import SIGNALS, put_back

#: Seconds that a block may take to end in which another signal is not heard.
_ENDING = 1.0


@contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted` while the block runs, and say how to carry on.

    People press Ctrl-C twice: a signal that comes while the block ends because of another changes nothing.
    """
    stopped_at = -_ENDING

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        if time.monotonic() - stopped_at > _ENDING:
            stopped_at = time.monotonic()
            raise Interrupted(number, "stopped")

    before = {int(number): signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except Interrupted as newest:
        stopped_at = time.monotonic()
        stopped = interruptions(newest)[-1]
        raise Interrupted(stopped.signal_number, f"{stopped}; {advice()}", stopped.saved) from None
    except RunDirectoryGoneError:  # which says it all
        raise
    except StorageError as error:
        error.add(f"Make room, or mend what is in the way; {advice()}")
        raise
    except RankLostError as error:
        error.add(advice()[:1].upper() + advice()[1:])
        raise
    finally:
        put_back(before)
