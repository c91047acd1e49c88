"""One contender in a process of its own: ``python -m at_smooth.bench.worker``, which nobody calls by hand.

It reads its task, then the number of steps of each round, a line of JSON each, and answers each with a line of JSON.
Between rounds it waits; it ends when nobody is left to ask.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import torch

from at_smooth.bench import contenders
from at_smooth.bench.memory import Memory
from at_smooth.bench.passes import step_flops
from at_smooth.bench.rate import Stand, layers_of, synchronize
from at_smooth.bench.workload import Variant, Workload
from at_smooth.exceptions import AtSmoothError
from at_smooth.runtime import Runtime, limited_threads, usable_device


class Over(Exception):  # noqa: N818 - no error: how a contender that trains for ever is told to stop
    """There is no further round."""


class Line:
    """The connection with who asks."""

    def __init__(self, questions: TextIO, answers: TextIO) -> None:
        self._questions = questions
        self._answers = answers

    def answer(self, **content: Any) -> None:
        """Say something."""
        print(json.dumps(content), file=self._answers, flush=True)

    def next(self) -> Any:
        """Wait for what is asked next.

        Raises:
            Over: Nobody asks any more.
        """
        line = self._questions.readline()
        if not line:
            raise Over
        return json.loads(line)


class Stopwatch:
    """Times the steps of each round, and waits between rounds.

    On a GPU the first step of a round is not timed: it gets back the memory that was left to the others meanwhile.
    """

    def __init__(self, line: Line, device: torch.device) -> None:
        self._line = line
        self._device = device
        self._left = 0
        self._warming = False
        self._seconds: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        """All is built; see :class:`~at_smooth.bench.contenders.Watch`."""
        self._memory = Memory(self._device)
        self._line.answer(ready=True)
        self._next_round()

    def stepped(self) -> None:
        """A step is done; likewise."""
        synchronize(self._device)
        now = time.perf_counter()
        if self._warming:
            self._warming = False
        else:
            self._seconds.append(now - self._began)
            self._left -= 1
        if not self._left:
            self._release()
            self._line.answer(seconds=self._seconds, **self._memory.figures())
            self._next_round()
        self._began = time.perf_counter()

    def _next_round(self) -> None:
        self._left, self._seconds = self._line.next(), []
        self._warming = self._device.type == "cuda"
        self._began = time.perf_counter()

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def rate(workload: Workload, variant: Variant, line: Line) -> None:
    """Times the network's layers alone; says first how many operations a step and the layers are."""
    runtime = Runtime.choose(workload.recipe.device)
    model = runtime.place(workload.network()).train()
    images, labels = contenders.one_batch(workload, runtime.device)
    dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
    layers = layers_of(model, images)
    kind = "matmul" if not layers or isinstance(layers[0].module, torch.nn.Linear) else "convolution"
    flops = step_flops(model, images, labels, workload.attack, runtime)
    stands = [Stand(layer, runtime.device, dtype) for layer in layers]
    line.answer(ready=True, kind=kind, step_flops=flops, layer_flops=sum(each.count * each.flops for each in stands))
    while True:
        line.next()
        line.answer(
            forward_seconds=sum(each.count * each.forward_seconds() for each in stands),
            backward_seconds=sum(each.count * each.backward_seconds() for each in stands),
        )


def _load_libraries() -> None:
    """Load what the first update of a process would load, which is no memory of training."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    torch.autograd.backward(weight.sum())
    optimizer.step()


def serve(line: Line) -> None:
    """Do what is asked until nobody asks."""
    try:
        task = line.next()
        workload, variant = Workload.from_dict(task["workload"]), Variant(**task["variant"])
        with limited_threads(workload.recipe.threads):
            if task["contender"] == "rate":
                rate(workload, variant, line)
            watch = Stopwatch(line, usable_device(workload.recipe.device))
            getattr(contenders, task["contender"])(workload, variant, watch)
    except Over:
        return
    except AtSmoothError as error:
        line.answer(error=str(error), exit_code=error.exit_code)


def main() -> None:
    """Be asked on the standard input, and answer on the standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    _load_libraries()
    serve(Line(sys.stdin, answers))


if __name__ == "__main__":
    main()
