"""A process that torchrun started: its process group, and who says what when a training of several ends early.

Each rank that ends by an error of its own puts its exit code into the store that torchrun's agent holds, which outlives
any of them. So a rank that loses its connection can tell a partner that ended (and says why itself) from one that died.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from at_smooth.early_words import launcher_died
from at_smooth.exceptions import Interrupted, RankLostError, exit_code_of
from at_smooth.interruption import ended_by_ctrl_c, ignore_signals, uninterrupted
from at_smooth.output import echo
from at_smooth.ranks import Ranks

#: What torchrun tells its processes.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

#: How long the ranks wait for each other at most. A rank that dies is noticed at once, by its connections.
_PATIENCE = timedelta(minutes=20)
#: Seconds that a rank waits for the words of another that is ending too.
_GRACE = 5.0
#: What the first rank tells where another says why all end.
_NOTHING = "nothing"
#: Seconds that ranks which are done wait for each other before they hang up.
_FAREWELL = 60.0

_store: list[Any] = []  # of the group that this process made last
_meetings = itertools.count()  # the agent's store outlives a group, so each group has keys of its own


def ranks_started() -> Ranks:
    """This process among those that torchrun started; one alone without it."""
    if any(not os.environ.get(name) for name in _VARIABLES):
        return Ranks.here()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks of this training. Where torchrun started this process, they meet here, and part when the block ends.

    A group that is there already is used as it is. Messages go by gloo, gradients on GPUs by NCCL.

    Raises:
        RankLostError: Another rank died or does not answer.
    """
    ranks = ranks_started()
    if Ranks.here().count > 1 or ranks.count == 1:
        with losses_told() if Ranks.here().count > 1 else nullcontext():
            yield Ranks.here()
        return
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # some builds of torch have neither
    from torch.distributed.rendezvous import rendezvous

    # Its functions keep the group that is there when they are imported; then nothing would end the group's threads.
    import_module("torch.distributed.nn.functional")

    with losses_told():
        gpus = torch.cuda.is_available()
        if gpus and ranks.local < torch.cuda.device_count():
            torch.cuda.set_device(ranks.local)
        with ended_by_ctrl_c():
            store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
            meeting = next(_meetings)
            _store[:] = [PrefixStore(f"at-smooth-{meeting}", store)]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=PrefixStore(f"group-{meeting}", store),
                rank=ranks.number,
                world_size=ranks.count,
                timeout=_PATIENCE,
            )
    try:
        with losses_told():
            yield ranks
            ranks.wait()
    except BaseException as error:
        with uninterrupted():
            if not isinstance(error, RankLostError):
                _note_end(ranks, error)
            if not gpus:  # the others learn of it at once; NCCL might wait for what never comes
                _hang_up(error)
        raise
    _part(ranks)
    _hang_up()


def stop_without_launcher(ranks: Ranks, words: str) -> None:
    """End all ranks as by SIGTERM where the torchrun of one of them is gone, together.

    Raises:
        Interrupted: It is.
    """
    if ranks.largest(launcher_died()):
        raise Interrupted(signal.SIGTERM, f"torchrun is gone; {words}")


def _part(ranks: Ranks) -> None:
    """Wait, by the store, until no rank is in a collective: gloo ends a process whose partner hangs up in one."""
    patience = time.monotonic() + _FAREWELL
    with suppress(RuntimeError):
        _store[0].add("done", 1)
        while _store[0].add("done", 0) < ranks.count and time.monotonic() < patience:
            time.sleep(0.01)


def _hang_up(error: BaseException | None = None) -> None:
    """Destroy the group when nothing holds it any longer; only so do its threads end here.

    The shared loss does, which is in a cycle, and perhaps in the frames of an error.
    """
    errors: list[BaseException | None] = [error]
    seen: set[int] = set()
    while errors:
        one = errors.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            errors += [one.__cause__, one.__context__]
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def losses_told() -> Iterator[None]:
    """Turn what torch says of a broken connection into one error of the family.

    From then on SIGINT and SIGTERM are ignored, for torchrun sends them to all that are left, which are ending anyway.

    Raises:
        RankLostError: Another rank died or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks_started().count == 1 or not _is_loss(error):
            raise
        ignore_signals()
        raise RankLostError("another process of this training was lost, or no longer answers.") from error


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _note_end(ranks: Ranks, error: BaseException) -> None:
    if launcher_died():  # and the store with it, which torch would complain of at length
        return
    with suppress(RuntimeError):  # the first to end is why the others do
        _store[0].compare_set("ended", "", f"{ranks.number} {exit_code_of(error)}")


def can_agree() -> bool:
    """Whether this process shares a store with other ranks, in which they agree on who speaks."""
    return bool(_store)


def last_words(text: str, error: BaseException) -> int:
    """Print why this process ends, on standard error: one rank for all, where they end for the same reason.

    Args:
        text: What to say.
        error: Why.

    Returns:
        What this process should exit with: where it only follows another rank, that one's code.
    """
    exit_code = exit_code_of(error)
    if not launcher_died():
        with suppress(RuntimeError):  # whoever held the store is gone
            return _agreed_words(ranks_started(), text, error, exit_code)
    if ranks_started().first or not isinstance(error, Interrupted):  # by which all ranks stop together
        echo(text, err=True)
    return exit_code


def _agreed_words(ranks: Ranks, text: str, error: BaseException, exit_code: int) -> int:
    store = _store[0]
    if isinstance(error, RankLostError | Interrupted):
        other, code = (int(part) for part in _value(store, "ended", f"{ranks.number} {exit_code}").split())
        if other != ranks.number and code != exit_code:
            if ranks.first:
                store.set("told", _NOTHING)
            # Once one has ended torchrun ends all others: leave that one time for its words, or for a traceback.
            _appears(store, "said", 2 * _GRACE)
            return code
    if not ranks.first and _appears(store, "told", _GRACE) and _value(store, "told", _NOTHING) == str(exit_code):
        return exit_code  # the first rank has said the same
    if isinstance(error, RankLostError) and store.add("loss", 1) > 1:
        return exit_code
    echo(text if ranks.first or isinstance(error, RankLostError) else f"rank {ranks.number}: {text}", err=True)
    store.set("said", "")
    if ranks.first:
        store.set("told", str(exit_code))
    return exit_code


def _value(store: Any, key: str, default: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else default


def _appears(store: Any, key: str, seconds: float) -> bool:
    """Wait a while for another rank to set a key."""
    patience = time.monotonic() + seconds
    while not store.check([key]) and time.monotonic() < patience:
        time.sleep(0.05)
    return bool(store.check([key]))
