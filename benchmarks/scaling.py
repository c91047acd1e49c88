"""Time training as the work grows: attack steps, batch, width, classes, image size, epochs, each varied alone.

    python benchmarks/scaling.py --json scaling.json

Prints a Markdown table each, with the exponent e of time ~ amount^e: least squares over the logarithms, of all points
and of the upper half, where what a step costs at any size weighs less.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import at_smooth
from at_smooth import Recipe, Runtime
from at_smooth.bench.contenders import engine
from at_smooth.bench.machine import in_words, machine
from at_smooth.bench.rate import synchronize
from at_smooth.bench.workload import Variant, Workload
from at_smooth.experiment import build_engine
from at_smooth.files import refuse_taken_file
from at_smooth.results import write_json
from at_smooth.runtime import limited_threads
from at_smooth.tables import Table

BASE = {"steps": 10, "batch": 32, "width": 16, "classes": 10, "image size": 32}
AMOUNTS = {
    "steps": [2, 5, 10, 20, 40],
    "batch": [8, 16, 32, 64, 128],
    "width": [8, 16, 32, 64],
    "classes": [10, 20, 50, 100, 200],
    "image size": [8, 16, 32, 64, 96],
    "epochs": [1, 2, 4, 8],
}
WARM_UP, LEAST, SECONDS = 2, 3, 0.5  # steps before the clock runs, steps at least, seconds at least


class Enough(Exception):
    """All steps that were wanted are timed."""


class Steps:
    """Times steps until there are enough of them."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.seconds: list[float] = []

    def begin(self) -> None:
        self._last = time.perf_counter()

    def stepped(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        timed = self.seconds[WARM_UP:]
        if len(timed) >= LEAST and sum(timed) >= SECONDS:
            raise Enough


def workload(options: argparse.Namespace, work: dict[str, int]) -> Workload:
    recipe = Recipe(
        dataset="digits", model=options.model, model_options={"width": work["width"]}, batch_size=work["batch"],
        attack_options={"steps": work["steps"], "mode": "train"}, eps="8/255", lr=0.001, threads=options.threads,
        device=options.device, precision=options.precision, epochs=work.get("epochs", 1), milestones=(0.5,),
    )  # fmt: skip
    return Workload(recipe, (3, work["image size"], work["image size"]), work["classes"])


def step_seconds(task: Workload, precision: str) -> float:
    """The median over some steps."""
    watch = Steps(Runtime.choose(task.recipe.device).device)
    with suppress(Enough):
        engine(task, Variant(precision), watch)
    return median(watch.seconds[WARM_UP:])


def training_seconds(task: Workload) -> float:
    """A whole training, with its measurements."""
    runtime = Runtime.choose(task.recipe.device, task.recipe.precision)
    trained = build_engine(task.recipe, task.data, runtime)
    began = time.perf_counter()
    trained.fit()
    synchronize(runtime.device)
    return time.perf_counter() - began


def exponent(amounts: list[int], seconds: list[float]) -> float:
    """The slope of the line through the logarithms."""
    slope, _ = np.polyfit(np.log(amounts), np.log(seconds), 1)
    return float(slope)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in options.axis or AMOUNTS:
        rounds: list[list[float]] = []
        for _ in range(options.rounds):  # over all amounts, then again
            rounds.append([])
            for amount in AMOUNTS[axis]:
                task = workload(options, {**BASE, axis: amount})
                taken = training_seconds(task) if axis == "epochs" else step_seconds(task, options.precision)
                rounds[-1].append(taken)
        seconds = [median(of_amount) for of_amount in zip(*rounds, strict=True)]
        half = len(seconds) // 2
        found[axis] = {
            "amounts": AMOUNTS[axis],
            "seconds": seconds,
            "exponent": exponent(AMOUNTS[axis], seconds),
            "exponent_upper_half": exponent(AMOUNTS[axis][half:], seconds[half:]),
        }
        print(table(axis, found[axis]).formatted("markdown"), end="\n\n", flush=True)
    return found


def table(axis: str, found: dict[str, Any]) -> Table:
    what = "training, s" if axis == "epochs" else "step, ms"
    unit = 1 if axis == "epochs" else 1000
    rows = [
        [str(amount), f"{unit * second:.4g}"] for amount, second in zip(found["amounts"], found["seconds"], strict=True)
    ]
    ends = [f"exponent {found['exponent']:.2f} over all, {found['exponent_upper_half']:.2f} over the upper half"]
    return Table(axis, [axis, what], rows, ends, words=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet", help="any model with an option 'width'")
    parser.add_argument("--axis", action="append", choices=list(AMOUNTS), help="only this one; may come several times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write every figure to this new file")
    options = parser.parse_args()
    try:
        refuse_taken_file(options.json)
        with limited_threads(options.threads):
            where = machine(workload(options, BASE).recipe)
            base = ", ".join(f"{name} {amount}" for name, amount in BASE.items())
            print(f"{in_words(where)}; {options.model}, {options.precision}; where not varied: {base}\n")
            found = measure(options)
    except at_smooth.AtSmoothError as error:
        raise SystemExit(f"Error: {error}") from None
    if options.json:
        write_json(options.json, {"scaling": found, "base": BASE, "model": options.model, "machine": where})


if __name__ == "__main__":
    main()
