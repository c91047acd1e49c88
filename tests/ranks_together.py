"""What several processes do together, for test_ranks.py; torchrun starts it as ``ranks_together.py OUT``."""

import copy
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from at_smooth import Interrupted, Observer, Recipe, checkpoint, experiment, files, load_data, load_model, train
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth.progress import Silent
from at_smooth.ranks import Ranks
from at_smooth.torchrun import process_group
from at_smooth_plugins.datasets.digits import Digits

#: No BatchNorm and no random start, so that the number of processes changes nothing but the order of sums. The radius
#: is so small that the random starts of the evaluation do not change which epoch is the best.
PLAIN = {
    "dataset": "digits",
    "dataset_options": {"pool": 100, "crop": 1},
    "model": "ranks_together:plain",
    "attack_options": {"steps": 2, "random_start": False},
    "eps": "0.02",
    "epochs": 3,
    "batch_size": 32,
    "eval_steps": 1,
    "test_every": 3,
    "device": "cpu",
}
CASES = {
    "at": {},
    "smoothed": {"regularizer": "kd-std-adv", "smoother": "swa", "smoother_options": {"start": 1}},
    "small-last-batch": {"batch_size": 29},  # of 90 images the last batch has 3
    "accumulate": {"accumulate": 2},
    "idle": {"model_options": {"idle": True}},
}
NORMED = {
    **PLAIN,
    "model": "convnet",
    "model_options": {"width": 4},
    "attack_options": {"steps": 2},
    "smoother": "ema",
    "keep_checkpoints": 1,
}


def plain(num_classes=10, idle=False):
    """A network without BatchNorm, and perhaps with parameters that nothing uses."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, num_classes))
    if idle:
        network[0].spare = nn.Linear(3, 3)
    return network


class Uneven(Digits):
    """Digits that the last rank has others of."""

    def load(self, data_dir):
        images = super().load(data_dir)
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return replace(images, train=255 - images.train) if last else images


class Keep(Silent, Observer):
    """Keeps what each epoch ends with on this rank, each step's seed, and how often a batch was measured."""

    def __init__(self):
        self.states, self.seeds, self.measured_batches = [], [], 0

    def phase(self, role, recipe, path):
        return nullcontext(self)

    def stepped(self, engine):
        self.seeds.append(torch.initial_seed())

    def measured(self, engine):
        self.measured_batches += 1

    def epoch_ended(self, engine, row, improved):
        smoothed = engine.smoother.smoothed()
        state = {"raw": engine.model.state_dict(), "smoothed": smoothed.state_dict() if smoothed else {}}
        self.states.append(copy.deepcopy({**state, "row": {**row, "seconds": None}, "improved": improved}))


class Signalled(Silent, Observer):
    """Sends its own process SIGTERM after a step, or in a measurement; it is heard at the next such moment."""

    def __init__(self, step, measured=False):
        self._step, self._measured = step, measured

    def phase(self, role, recipe, path):
        return nullcontext(self)

    def stepped(self, engine):
        if engine.step == self._step and not self._measured:
            os.kill(os.getpid(), signal.SIGTERM)

    def measured(self, engine):
        if engine.step == self._step and self._measured:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(recipe, path, watcher, **options):
    """Train until a signal comes, and say where it stopped."""
    with told(watcher):
        try:
            train(recipe, path, progress=watcher, **options)
        except Interrupted as stop:
            return str(stop)
    return "never stopped"


@contextmanager
def told(watcher):
    """Ranks other than the first tell nobody how it goes: here they tell the watcher."""
    silent, experiment.Silent = experiment.Silent, lambda: watcher
    try:
        yield
    finally:
        experiment.Silent = silent


def everything(out, ranks):
    """All trainings; those of which something else is kept than the run come last."""
    written, replacing = [], files.replacing

    def noted(path):
        written.append(str(path.relative_to(out)))
        return replacing(path)

    if ranks.count > 1:
        checkpoint.replacing = files.replacing = noted
    for name, changes in CASES.items():
        train(Recipe(**{**PLAIN, **changes}), out / name)
    if ranks.count > 1:
        kept = {**of_batchnorm(out / "normed", ranks), "stops": of_stops(out, ranks), "written": written}
        torch.save(kept, out / f"rank-{ranks.number}.pt")


def of_stops(out, ranks):
    """Stop by a signal to the last rank, after a step and in a measurement, and go on; go on with a run of one process.

    The first leaves ``half`` behind, a run that is stopped.
    """
    me_last = ranks.number == ranks.count - 1
    stops = [
        stopped(Recipe(**NORMED), out / "stopped", Signalled(4 if me_last else -1)),
        stopped(Recipe(**NORMED), out / "stopped", Signalled(6 if me_last else -1, measured=True), resume=True),
        stopped(Recipe(**PLAIN), out / "half", Signalled(4 if me_last else -1)),
    ]
    train(Recipe(**NORMED), out / "stopped", resume=True)
    train(Recipe(**PLAIN), out / "begun-alone", resume=True)
    return stops


def of_batchnorm(path, ranks):
    """What this rank has of a run with BatchNorm: the states after each epoch, and one average refreshed anew."""
    keep = Keep()
    with told(keep):
        train(Recipe(**NORMED), path, progress=keep)
    model = load_model(path, weights="raw").train()
    data = load_data(path)
    shared, alone = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        refresh_batchnorm(shared, of_this_rank(data, ranks), ranks=ranks)
        refresh_batchnorm(alone, [batch.clean for batch in data.train_batches(0, 32)])
    return {
        "states": keep.states,
        "seeds": keep.seeds,
        "measured": keep.measured_batches,
        "shared": shared.state_dict(),
        "alone": alone.state_dict(),
    }


def of_this_rank(data, ranks):
    return [batch.clean for batch in data.train_batches(0, 32, sharing=ranks.turn) if len(batch)]


if __name__ == "__main__":
    os.environ["AT_SMOOTH_CACHE"] = f"{sys.argv[1]}/cache"
    torch.set_num_threads(1)
    with process_group() as group:
        assert group == Ranks.here()
        everything(Path(sys.argv[1]), group)
