"""Who says why a training of several processes ends before they have met. All of it without torch."""

from __future__ import annotations

import os
import time

from at_smooth.interruption import ended_by_ctrl_c

#: Seconds that the others leave to the first, which may take its time to start.
_SILENCE = 10.0

_parent = os.getppid()  # as this process begins


def launcher_died() -> bool:
    """Whether torchrun, which started this process, is gone: then nobody passes a signal on or ends the other ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _parent


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def first_here() -> bool:
    """Whether this is the first rank of its machine, which speaks for all of them."""
    return not several() or os.environ["LOCAL_RANK"] == "0"


def wait_to_speak() -> str:
    """Wait, unless this is the first rank of its machine, for torchrun to end this process.

    It does when the first has ended, having said why. So nobody speaks twice, and none ends the first by ending before
    it. If this comes back, the first goes on: what is wrong is wrong with this rank alone.

    Returns:
        What this rank's words begin with: its number, or nothing where it speaks for all.
    """
    if not first_here():
        with ended_by_ctrl_c():
            time.sleep(_SILENCE)
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if several() and rank != "0" else ""
