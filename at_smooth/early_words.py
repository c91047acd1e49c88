"""Who says why a training of several processes ends before they have met: the first. All of it without torch."""

from __future__ import annotations

import os
import signal
import time

import click

from at_smooth.interruption import SIGNALS, put_back

#: Seconds that the others leave to the first, which may take its time to start.
_GRACE = 10.0


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def let_the_first_speak() -> None:
    """Wait, unless this is the first rank, until torchrun ends this process, as it does when the first has ended.

    So nobody speaks twice, and none ends the first by ending before it. If this comes back, the first had no such
    reason to end: the words that follow are this rank's own, and begin with its number.
    """
    rank = os.environ.get("RANK", "0")
    if not several() or rank == "0":
        return
    before = {int(number): signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    time.sleep(_GRACE)
    put_back(before)
    click.echo(f"rank {rank}: ", err=True, nl=False)
