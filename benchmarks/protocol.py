"""Time an epoch of the paper's protocol, by the engine and as a script would be written, on made-up images.

    python benchmarks/protocol.py --precision bf16 --compile --json protocol.json

Adversarial training with two teachers (kd-std-adv), SWA from the first epoch on, its BatchNorm statistics refreshed,
and SA and RA (PGD-20) of the raw and of the averaged model. The plain script does as the paper's published one:
float32, torch's own memory layout, both models measured on validation and test set after every epoch. The engine
measures both on the validation set after every epoch, or only every so often, and on the test set in the last five
epochs and for the best one, which is all that the paper's tables hold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import at_smooth
from at_smooth import PGD, Data, Engine, Observer, Part, Recipe, Runtime
from at_smooth.bench.machine import in_words, machine
from at_smooth.bench.rate import synchronize
from at_smooth.experiment import build_engine
from at_smooth.files import refuse_taken_file
from at_smooth.network import build_network
from at_smooth.results import write_json
from at_smooth.runtime import limited_threads, usable_device
from at_smooth.tables import Table

NEVER = 10**4  # epochs: the settings' end, which is not waited for
TEMPERATURE, L_ADV, L_STD = 2.0, 0.5, 0.25  # the paper's


class Clock:
    """Adds up the seconds of what it is told to time.

    Args:
        device: What to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """The time at which everything is done that was begun."""
        synchronize(self.device)
        return time.perf_counter()

    def time(self, name: str, work: Callable[..., Any], *given: Any) -> Any:
        """What ``work`` gives; its seconds go under ``name``."""
        began = self.now()
        result = work(*given)
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began
        return result


class Clocked(nn.Module):
    """A teacher whose forward passes are timed."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.model = model
        self._clock = clock

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._clock.time("teachers", self.model, images)
        return logits


class RandomTeachers:
    """Gives frozen networks with random weights: a teacher's forward pass takes as long whatever it has learnt."""

    def __init__(self, make: Callable[[], nn.Module], clock: Clock) -> None:
        self._make = make
        self._clock = clock

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        return Clocked(self._make(), self._clock)


class Enough(Exception):
    """All epochs that were wanted are timed."""


class Splits(Observer):
    """Splits each epoch into its steps and the rest."""

    def __init__(self, clock: Clock, epochs: int) -> None:
        self._clock, self._left = clock, epochs
        self.epochs: list[dict[str, float]] = []

    def started(self, engine: Engine) -> None:
        self._began = self._clock.now()
        self._clock.seconds.clear()

    def stepped(self, engine: Engine) -> None:
        self._trained = self._clock.now()

    def epoch_ended(self, engine: Engine, row: Any, improved: list[str]) -> None:
        now = self._clock.now()
        self.epochs.append({
            "steps": self._trained - self._began,
            "refresh and validation": now - self._trained,
            "teachers": self._clock.seconds.get("teachers", 0.0),
        })  # fmt: skip
        for model in (engine.model, engine.smoother.smoothed()):
            if model is not None:
                self._clock.time("test", engine.accuracies, model, engine.data.test)
        self.epochs[-1]["test"] = self._clock.seconds["test"]
        print(f"engine, epoch {len(self.epochs)}: {now - self._began:.1f} s", flush=True)
        self._left -= 1
        if not self._left:
            raise Enough
        self.started(engine)


class Plain:
    """The protocol as a script."""

    def __init__(self, make: Callable[[], nn.Module], data: Data, recipe: Recipe, device: torch.device) -> None:
        self.model, self.average = make().to(device), make().to(device)
        self.clock = Clock(device)
        self.teachers = [Clocked(make().to(device).eval(), self.clock) for _ in range(2)]
        self.data, self.recipe = data.to(device), recipe
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.averaged = 0

    def epoch(self, number: int) -> dict[str, float]:
        """One epoch; the seconds of its parts."""
        self.clock.seconds.clear()
        self.clock.time("steps", self.train, number)
        self.clock.time("refresh and validation", self.average_and_validate, number)
        self.clock.time("test", self.measure_both, self.data.test)
        return dict(self.clock.seconds)

    def train(self, number: int) -> None:
        attack = self.attack(self.model, self.recipe.attack_options["steps"])
        attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
        self.model.train()
        for batch in self.data.train_batches(number, self.recipe.batch_size):
            perturbed = attack(batch.clean, batch.labels)
            logits = self.model(perturbed)
            with torch.no_grad():
                robust, standard = (teacher(perturbed) for teacher in self.teachers)
            loss = (1 - L_ADV - L_STD) * F.cross_entropy(logits, batch.labels)
            loss = loss + L_ADV * distillation(logits, robust) + L_STD * distillation(logits, standard)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            loss.item()

    def average_and_validate(self, number: int) -> None:
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.add_((new - mean) / (self.averaged + 1))
        self.averaged += 1
        batches = self.data.train_batches(number, self.recipe.batch_size)
        update_bn((batch.clean for batch in batches), self.average)
        self.measure_both(self.data.val)

    def measure_both(self, part: Part) -> None:
        for model in (self.model, self.average):
            model.eval()
            attack = self.attack(model, self.recipe.eval_steps)
            for batch in part.batches(self.recipe.batch_size):
                perturbed = attack(batch.clean, batch.labels)
                with torch.no_grad():
                    (model(batch.clean).argmax(1) == batch.labels).sum().item()
                    (model(perturbed).argmax(1) == batch.labels).sum().item()

    def attack(self, model: nn.Module, steps: int) -> Any:
        spec = PGD(threat=self.recipe.threat, steps=steps)
        return torchattacks.PGD(model, self.recipe.eps, spec.step_size, steps, True)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    soft = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), soft, reduction="batchmean") * TEMPERATURE**2


def made_up(train: int, val: int, test: int) -> Data:
    rng = torch.Generator().manual_seed(0)

    def part(n: int) -> Part:
        return Part(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng), torch.arange(n) % 10)

    return Data(part(train), part(val), part(test), 10)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    recipe = Recipe(
        dataset="digits", model=options.model, regularizer="kd-std-adv", smoother="swa", smoother_options={"start": 0},
        attack_options={"steps": options.steps, "mode": "train"}, eps="8/255", batch_size=options.batch_size,
        epochs=NEVER, eval_steps=options.eval_steps, test_every=0, lr=0.01, threads=options.threads,
        device=options.device, precision=options.precision, compile=options.compile,
    )  # fmt: skip
    data = made_up(options.train, options.val, options.test)

    def make() -> nn.Module:
        return build_network(recipe, data.shape, data.num_classes, data.pixel_statistics())

    plain = Plain(make, data, recipe, usable_device(options.device))  # torch as scripts leave it
    theirs: list[dict[str, float]] = []
    _warm_up()
    for number in range(options.rounds):
        theirs.append(plain.epoch(number))
        print(f"plain script, epoch {number + 1}: {_whole(theirs[-1]):.1f} s", flush=True)

    runtime = Runtime.choose(options.device, options.precision, options.compile)
    clock = Clock(runtime.device)
    engine = build_engine(recipe, data, runtime, RandomTeachers(lambda: runtime.teacher(make()), clock))
    splits = Splits(clock, options.rounds + 1)  # the first compiles
    with suppress(Enough):
        engine.fit(splits)
    of_plain, of_engine = _medians(theirs), _medians(splits.epochs[1:])
    return {
        "plain_seconds": of_plain,
        "engine_seconds": of_engine,
        "first_epoch_seconds": _epoch(splits.epochs[0]),
        **ratios(of_plain, of_engine),
        "as_asked": [
            as_asked(of_plain, of_engine, options.epochs, options.test_every, every) for every in options.validate_every
        ],
        "machine": machine(recipe),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
    }


def ratios(plain: dict[str, float], engine: dict[str, float]) -> dict[str, float]:
    """What follows from the seconds of the parts of an epoch."""
    return {
        "speedup_steps": plain["steps"] / engine["steps"],
        "speedup_without_test": _epoch(plain) / _epoch(engine),
        "speedup_with_test": _whole(plain) / _whole(engine),
        "share_teachers_plain": plain["teachers"] / plain["steps"],
        "share_teachers_engine": engine["teachers"] / engine["steps"],
    }


def as_asked(
    plain: dict[str, float], engine: dict[str, float], epochs: int, test_every: int, validate_every: int
) -> dict[str, float]:
    """The published script's epoch against one of the engine's, whose measurements are spread over all epochs."""
    validated = epochs // validate_every + (epochs % validate_every > 0)  # the last epoch is
    tested = min(epochs, 5) + 1 + (max(epochs - 5, 0) // test_every if test_every else 0)  # the last five, the best
    measuring = engine["refresh and validation"] * validated + engine["test"] * tested
    seconds = engine["steps"] + measuring / epochs
    return {"validate_every": validate_every, "engine_seconds": seconds, "speedup": _whole(plain) / seconds}


def _warm_up() -> None:
    """The first update of a process loads what is not the script's."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _medians(epochs: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(epoch[name] for epoch in epochs) for name in epochs[0]}


def _epoch(seconds: dict[str, float]) -> float:
    return seconds["steps"] + seconds["refresh and validation"]


def _whole(seconds: dict[str, float]) -> float:
    return _epoch(seconds) + seconds["test"]


def table(found: dict[str, Any]) -> Table:
    plain, engine, options = found["plain_seconds"], found["engine_seconds"], found["options"]

    def row(name: str, theirs: float, ours: float) -> list[str]:
        return [name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}"]

    rows = [row(name, plain[name], engine[name]) for name in ("steps", "refresh and validation", "test")]
    rows += [
        row("epoch, like for like, without the test set", _epoch(plain), _epoch(engine)),
        row("epoch, like for like, with the test set", _whole(plain), _whole(engine)),
    ]
    for asked in found["as_asked"]:
        name = f"epoch, as asked, --validate-every {asked['validate_every']}"
        rows.append(row(name, _whole(plain), asked["engine_seconds"]))
    notes = [
        f"{options['train']} training, {options['val']} validation, {options['test']} test images; batch "
        f"{options['batch_size']}, PGD-{options['steps']}, measured by PGD-{options['eval_steps']}",
        f"As asked: the test set in the last five of {options['epochs']} epochs and for the best one"
        + (f", and every {options['test_every']} epochs" if options["test_every"] else ""),
        f"The two teachers' forward passes take {100 * found['share_teachers_engine']:.1f} % of the engine's steps, "
        f"{100 * found['share_teachers_plain']:.1f} % of the plain script's",
        f"The engine's first epoch, which compiles where asked, took {found['first_epoch_seconds']:.1f} s",
        in_words(found["machine"]),
    ]
    variant = options["precision"] + ("+compile" if options["compile"] else "")
    return Table("", ["part", "plain script, s", f"engine {variant}, s", "speedup"], rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact-resnet-18")
    sizes = {"train": 256, "val": 32, "test": 64, "batch-size": 32, "steps": 10, "eval-steps": 20, "rounds": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--epochs", type=int, default=200, help="of the whole training, over which tests are spread")
    parser.add_argument("--validate-every", type=int, nargs="+", default=[1, 5, 10], help="default 1 5 10")
    parser.add_argument("--test-every", type=int, default=0, help="epochs between tests; 0: as the tables need it")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write every figure to this new file")
    options = parser.parse_args()
    try:
        refuse_taken_file(options.json)
        with limited_threads(options.threads):
            found = measure(options)
    except at_smooth.AtSmoothError as error:
        raise SystemExit(f"Error: {error}") from None
    print(f"\n{table(found).formatted('markdown')}")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
