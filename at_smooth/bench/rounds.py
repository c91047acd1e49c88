"""Alternating rounds: each contender in turn, then all of them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from at_smooth.bench.figures import Measured
from at_smooth.bench.machine import machine
from at_smooth.bench.worker_process import Worker
from at_smooth.bench.workload import Variant, Workload

_LONG = 1.0  # second: a step of which one is warm-up enough
_ROUND_SECONDS = 0.5  # of a round of short steps
_MOST_STEPS = 100  # in a round


def measure(
    workload: Workload,
    variants: Sequence[Variant],
    rounds: int,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Time all contenders side by side.

    Args:
        workload: What they work on.
        variants: The engine's arithmetics; the plain loop is float32 always.
        rounds: How often each has its turn.
        note: Told what is going on, in words.

    Returns:
        Every time that was taken, and what follows from them.

    Raises:
        OptionError: A contender cannot do this.
        BenchError: A contender ended before it was done.
    """
    fp32 = Variant()
    precisions = dict.fromkeys(["fp32", *(variant.precision for variant in variants)])
    lineup = [("rate", Variant(precision)) for precision in precisions]
    lineup += [("plain", fp32)]
    contenders = [each for variant in variants for each in (("engine", variant), ("bare", variant.passes))]
    lineup += dict.fromkeys(contenders)
    measured = Measured(workload, tuple(dict.fromkeys(variants)), machine(workload.recipe))
    steps = 1
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(*each, workload)) for each in lineup]  # all import at once
        for worker, (contender, variant) in zip(workers, lineup, strict=True):
            note(f"{worker.name}: warming up{', which compiles' if variant.compile else ''}")
            measured.about[worker.name] = worker.begin()
            taken = worker.round(1).get("seconds", [0.0])[-1]
            if variant.compile or taken < _LONG:
                taken = worker.round(1).get("seconds", [0.0])[-1]
            if contender == "plain":
                steps = max(1, min(_MOST_STEPS, round(_ROUND_SECONDS / max(taken, 1e-9))))
        for number in range(1, rounds + 1):
            note(f"round {number} of {rounds}: {steps} {'steps' if steps > 1 else 'step'} each")
            for worker in workers:
                measured.rounds.setdefault(worker.name, []).append(worker.round(steps))
    return measured
