"""Would folding BatchNorm into the convolutions make an attack in eval mode faster? PreActResNet-18, one PGD-10.

    python benchmarks/folding.py

It folds with torch's own ``fuse``, which finds a BatchNorm that follows a convolution and nothing else. The weights
change in every step, so a training would fold anew before each attack; that time is a column of its own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from at_smooth import Adversary, AttackSpec, Runtime, Threat, create


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def attack(model: nn.Module, runtime: Runtime, batch: int) -> Callable[[], object]:
    """A PGD-10 on one batch of made-up images."""
    adversary = Adversary(model, AttackSpec.parse("pgd", Threat("Linf", 8 / 255), {"mode": "eval"}))
    images, labels = torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def work() -> object:
        with runtime.attacking(model):
            return adversary(images, labels)

    return work


def main() -> None:
    """Measure in alternating rounds and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with torch.compile as well; takes some minutes more")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = create("models", "preact-resnet-18", {}).build((3, 32, 32), 10).eval()
    works: dict[str, Callable[[], object]] = {}
    for precision in ("fp32", "bf16"):
        for compiled in (False, True) if arguments.compile else (False,):
            runtime = Runtime.choose("cpu", precision, compiled)
            for folded in (False, True):
                model = runtime.compiling(runtime.place(fuse(network) if folded else copy.deepcopy(network)))
                name = f"{precision}{', compiled' if compiled else ''} | {'folded' if folded else 'as it is'}"
                works[name] = attack(model, runtime, arguments.batch_size)
    for work in works.values():
        work()  # the first time is slow
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    folding = statistics.median(seconds(lambda: fuse(network)) for _ in range(arguments.rounds))

    print("| precision | BatchNorm | attack, s | folding, s | speed |")
    print("| --- | --- | ---: | ---: | ---: |")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        precision, _, kind = name.partition(" | ")
        before = medians[f"{precision} | as it is"]
        cost = folding if kind == "folded" else 0
        print(f"| {name} | {median:.2f} | {cost:.2f} | {before / (median + cost):.2f} |")


if __name__ == "__main__":
    main()
