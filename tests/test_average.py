import json
import os
import signal
from contextlib import nullcontext

import pytest
import torch

from at_smooth import InputError, Interrupted, Observer, Run, RunError, load_data, load_model, train
from at_smooth.average import average_snapshots
from at_smooth.progress import Silent

EVERY = {"keep_checkpoints": 2, "epochs": 6, "model": "convnet", "model_options": {"width": 4}}


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """A run of a network with BatchNorm that kept a snapshot every other epoch, and averaged online from epoch 2."""
    recipe = tiny(smoother="swa", smoother_options={"start": 1, "every": 2}, **EVERY)
    return train(recipe, tmp_path_factory.mktemp("kept") / "run")


def test_snapshots_are_kept_every_so_many_epochs(kept):
    assert sorted(path.name for path in kept.path.glob("checkpoints/epoch-*.pt")) == [
        "epoch-0002.pt", "epoch-0004.pt", "epoch-0006.pt"
    ]  # fmt: skip
    final = torch.load(kept.checkpoint("final"), weights_only=True)["raw"]
    last = torch.load(kept.snapshot(6), weights_only=True)["raw"]
    assert all(torch.equal(tensor, last[name]) for name, tensor in final.items())


def test_the_average_afterwards_equals_the_online_one_bit_for_bit(kept, tmp_path):
    result = average_snapshots(kept.path, first=2, every=2, out=tmp_path / "average.pt")
    assert result.epochs == [2, 4, 6]
    online, afterwards = load_model(kept.path, weights="smoothed"), load_model(result.path)
    assert online.state_dict().keys() == afterwards.state_dict().keys()
    for name, tensor in online.state_dict().items():
        assert torch.equal(tensor, afterwards.state_dict()[name]), name
    final = kept.summary["smoothed"]["final"]
    assert result.accuracies["test"] == (final["test_sa"], final["test_ra"])
    assert result.accuracies["validation"] == (kept.history[-1]["smoothed_val_sa"], kept.history[-1]["smoothed_val_ra"])


def test_adversarial_statistics_are_others_on_the_same_weights(kept, tmp_path):
    clean = load_model(average_snapshots(kept.path, first=2, every=2, out=tmp_path / "clean.pt").path)
    result = average_snapshots(kept.path, first=2, every=2, bn="adversarial", out=tmp_path / "adversarial.pt")
    adversarial = load_model(result.path)
    parameters = zip(clean.named_parameters(), adversarial.parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), other in parameters)
    statistics = {name for name, tensor in clean.named_buffers() if "running" in name}
    assert statistics
    assert all(not torch.equal(clean.get_buffer(name), adversarial.get_buffer(name)) for name in statistics)


def test_a_part_of_the_epochs_can_be_chosen(kept, tmp_path):
    result = average_snapshots(kept.path, first=2, every=2, last=5, out=tmp_path / "a.pt")
    assert result.epochs == [2, 4]
    weights = [torch.load(kept.snapshot(epoch), weights_only=True)["raw"] for epoch in (2, 4)]
    for name, parameter in load_model(result.path).named_parameters():
        torch.testing.assert_close(parameter, (weights[0][name] + weights[1][name]) / 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first": 2}, "no snapshot of epoch 3, 5. It kept 2, 4, 6"),
        ({"first": 8}, "no snapshot from 8 on"),
        ({"first": 2, "every": 2, "last": 8}, "no snapshot of epoch 8"),
        ({"first": 2, "every": 2, "bn": "dirty"}, "bn is 'dirty'"),
    ],
)
def test_epochs_that_were_not_kept_are_refused(kept, options, words, contents):
    before = contents(kept.path)
    with pytest.raises(InputError, match=words):
        average_snapshots(kept.path, **options)
    assert contents(kept.path) == before


def test_a_run_without_snapshots_is_told_how_to_keep_them(plain_run):
    with pytest.raises(RunError, match="--keep-checkpoints every=N"):
        average_snapshots(plain_run.path, first=1)


def test_nothing_is_written_over(kept, tmp_path):
    (tmp_path / "mine.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        average_snapshots(kept.path, first=2, every=2, out=tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_bytes() == b"mine"


SMOOTHED = {
    "smoother": "swa",
    "model": "convnet",
    "model_options": {"width": 4},
    "epochs": 6,
    "validate_every": 3,
    "test_every": 0,
}


@pytest.mark.parametrize(
    ("smoother", "options"),
    [("swa", {"start": 1}), ("swa", {"start": 1, "every": 4}), ("ema", {"start": 2}), ("iswa", {"start": 1})],
    ids=str,
)
def test_snapshots_of_the_average_change_no_bit(tiny, tmp_path, assert_same_outcome, smoother, options):
    recipe = tiny(**{**SMOOTHED, "smoother": smoother, "smoother_options": options, "epochs": 5})
    without = train(recipe, tmp_path / "without")
    kept = train(recipe.replacing(keep_checkpoints=1), tmp_path / "kept")
    states = [torch.load(run.checkpoint("last"), weights_only=True)["state"] for run in (without, kept)]
    for part in ("model", "smoother"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][part][name]))
                   for name, value in states[0][part].items())  # fmt: skip
    assert kept.snapshot(5).is_file()
    for file in kept.path.glob("checkpoints/epoch-*.pt"):
        file.unlink()
    for run in (without, kept):
        summary = run.summary
        summary["recipe"]["keep_checkpoints"] = 0
        (run.path / "summary.json").write_text(json.dumps(summary))
    assert_same_outcome(without, kept)


def test_a_snapshot_holds_the_average_with_fresh_statistics(tiny, tmp_path):
    run = train(tiny(**SMOOTHED, smoother_options={"start": 2}, keep_checkpoints=1), tmp_path / "run")
    held = {epoch: torch.load(run.snapshot(epoch), weights_only=True)["smoothed"] for epoch in range(1, 7)}
    assert [epoch for epoch, smoothed in held.items() if smoothed is None] == [1, 2]
    for epoch in (3, 4, 6):  # of which the fourth is not measured
        path = average_snapshots(run.path, first=3, last=epoch, out=tmp_path / f"average-{epoch}.pt").path
        online, afterwards = (load_model(file, weights="smoothed") for file in (run.snapshot(epoch), path))
        for name, tensor in online.state_dict().items():
            assert torch.equal(tensor, afterwards.state_dict()[name]), (epoch, name)


def test_a_run_that_is_stopped_while_a_snapshot_is_refreshed_keeps_the_same(
    tiny, stopped_run, tmp_path, assert_same_outcome
):
    changes = {**SMOOTHED, "smoother_options": {"start": 0}, "keep_checkpoints": 1}
    whole, path = train(tiny(**changes), tmp_path / "whole"), tmp_path / "run"

    class Stopping(Observer):
        def measured(self, engine):
            if engine.epoch == 2:  # which is not measured but for its snapshot
                os.kill(os.getpid(), signal.SIGINT)

    progress = Silent()
    progress.phase = lambda role, recipe, path: nullcontext(Stopping())
    with pytest.raises(Interrupted, match="while epoch 2 was measured"):
        train(tiny(**changes), path, progress=progress)
    assert not Run(path).snapshot(2).exists()
    assert_same_outcome(whole, train(tiny(**changes), path, resume=True))


class Sizes(Observer):
    def __init__(self, path):
        self.path, self.disk, self.memory = path, {}, {}

    def epoch_ended(self, engine, row, improved):
        files = [file for file in self.path.rglob("*") if file.is_file()]
        self.disk[engine.epoch] = sum(file.stat().st_size for file in files)
        with open("/proc/self/statm") as file:
            self.memory[engine.epoch] = int(file.read().split()[1]) * 4096


def test_memory_and_disk_do_not_grow_with_epochs(tiny, tmp_path):
    sizes = Sizes(tmp_path / "run")
    progress = Silent()
    progress.phase = lambda role, recipe, path: nullcontext(sizes)
    recipe = tiny(
        epochs=200, dataset_options={"pool": 40}, attack_options={"steps": 1}, eval_steps=0, test_every=0,
        smoother="swa", smoother_options={"start": 0},
    )  # fmt: skip
    run = train(recipe, tmp_path / "run", progress=progress)
    assert len(sizes.disk) == 200
    assert sizes.disk[200] - sizes.disk[20] < 180 * 1000  # a row in metrics.csv, the same in last.pt
    assert sizes.memory[200] - sizes.memory[20] < 32e6
    assert {path.name for path in run.path.glob("checkpoints/*")} == {
        "last.pt", "best.pt", "best_smoothed.pt", "final.pt"
    }  # fmt: skip
    assert isinstance(run, Run)
    assert load_data(run.path).train.n == 36
