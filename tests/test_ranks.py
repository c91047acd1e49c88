import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from at_smooth import Data, OptionError, Recipe, Run, checkpoint, train
from at_smooth.data import Augmentation
from at_smooth.ranks import Ranks
from at_smooth.runtime import Runtime

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # its recipes name a network in it

import ranks_together  # noqa: E402
from launcher import Torchrun  # noqa: E402


def weights_of(path, name="final", kind="raw"):
    return checkpoint.load(path / "checkpoints" / f"{name}.pt")[kind]


def assert_near(one, other):
    for name, value in one.items():
        distance = (value.double() - other[name].double()).norm() / value.double().norm().clamp_min(1e-12)
        assert distance < 1e-5, name


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


# --- shares, in one process ---


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [2, 13, 14, 32])
def test_shares_are_the_batch_in_order(n, count):
    batch = torch.arange(n)
    shares = [Ranks(number, count).share(n).of(batch) for number in range(count)]
    if n < 2 * count:
        assert all(torch.equal(share, batch) for share in shares)
    else:
        assert torch.equal(torch.cat(shares), batch)
        assert {len(share) for share in shares} <= {n // count, n // count + 1}


def test_batches_are_dealt_out_in_turns():
    turns = [[Ranks(number, 3).turn(5, batch).stop for batch in range(7)] for number in range(3)]
    assert turns == [[5, 0, 0, 5, 0, 0, 5], [0, 5, 0, 0, 5, 0, 0], [0, 0, 5, 0, 0, 5, 0]]


def test_shares_of_a_batch_are_augmented_as_the_whole(toy_images):
    augmentation = Augmentation(crop=1, flip=True, rotation=20)
    data = Data.split(toy_images(n=57), validation=0.25, augmentation=augmentation)
    for sharing in ("share", "turn"):
        passes = [list(data.train_batches(1, 10, sharing=getattr(Ranks(number, 3), sharing))) for number in range(3)]
        for batch, *shares in zip(data.train_batches(1, 10), *passes, strict=True):
            if shares[0].whole is None and sharing == "share":  # too small to share
                assert all(torch.equal(share.clean, batch.clean) for share in shares)
                continue
            assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
            assert torch.allclose(torch.cat([share.clean for share in shares]), batch.clean, atol=1e-6)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match="one GPU; 4 processes"):
        Runtime.choose("cuda:3", ranks=Ranks(0, 4))
    with pytest.raises(OptionError, match="no GPU 2: this machine has 2"):
        Runtime.choose("cuda", ranks=Ranks(2, 4, local=2))


# --- several processes ---


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trainings of ``ranks_together`` by this process."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AT_SMOOTH_CACHE", str(out / "cache"))
        ranks_together.everything(out, Ranks())
    return out


def together(count, out):
    recipe = Recipe(**ranks_together.PLAIN)
    assert "stopped" in ranks_together.stopped(recipe, out / "begun-alone", ranks_together.Signalled(4))
    run = Torchrun(count, HERE / "ranks_together.py", out, cache=out / "cache", log=out / "log")
    status, _, text = run.end()
    assert status == 0, text
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two processes."""
    return together(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same by three, whose shares differ in size."""
    return together(3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request):
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


@pytest.mark.parametrize("case", ranks_together.CASES)
def test_without_batchnorm_several_processes_end_with_the_weights_of_one(alone, several, case):
    assert_near(weights_of(alone / case), weights_of(several / case))
    rows = [checkpoint.load(path / case / "checkpoints" / "final.pt")["row"] for path in (alone, several)]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)
    assert rows[0]["train_acc"] == rows[1]["train_acc"]
    assert rows[0]["val_sa"] == rows[1]["val_sa"]
    assert rows[0]["test_sa"] == rows[1]["test_sa"]
    assert rows[0]["test_ra"] == pytest.approx(rows[1]["test_ra"], abs=3)  # its random starts differ
    if case == "smoothed":
        assert_near(weights_of(alone / case, kind="smoothed"), weights_of(several / case, kind="smoothed"))


def test_teachers_are_trained_by_all_and_published_once(several):
    teachers = sorted(path.name for path in (several / "smoothed" / "teachers").iterdir())
    assert teachers == ["at", "standard"]
    assert len(list((several / "cache" / "teachers").glob("[!.]*"))) == 2
    assert not list((several / "cache" / "teachers").glob(".*"))


def test_models_and_decisions_are_the_same_bits_on_all_ranks(several):
    first, *others = (torch.load(path, weights_only=False) for path in sorted(several.glob("rank-*.pt")))
    assert len(first["states"]) == ranks_together.NORMED["epochs"]
    streams = torch.tensor([first["seeds"], *(other["seeds"] for other in others)])
    assert len(streams.unique()) == streams.numel() > 0  # random starts differ between ranks and steps
    for other in others:
        assert other["measured"] == first["measured"] > 0
        for mine, theirs in zip(first["states"], other["states"], strict=True):
            assert_same(mine["raw"], theirs["raw"])
            assert_same(mine["smoothed"], theirs["smoothed"])
            assert mine["row"] == theirs["row"]
            assert mine["improved"] == theirs["improved"]
        assert_same(first["shared"], other["shared"])


def test_statistics_of_an_average_are_those_of_one_process(several):
    kept = torch.load(several / "rank-1.pt", weights_only=False)
    moved = [name for name in kept["alone"] if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(moved) == 6
    for name in moved:
        assert torch.allclose(kept["shared"][name].double(), kept["alone"][name].double(), rtol=1e-5, atol=1e-7)
    assert kept["shared"].keys() == kept["alone"].keys()


def test_only_the_first_writes(several):
    run = several / "normed"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == len(list(several.glob("rank-*.pt")))
    assert "resumed" not in environment
    assert not list(run.rglob(".*"))
    first, *others = (torch.load(path, weights_only=False)["written"] for path in sorted(several.glob("rank-*.pt")))
    assert {"at/recipe.yaml", "at/summary.json", "smoothed/teachers/at/metrics.csv", "normed/checkpoints/last.pt"} <= {
        *first
    }
    assert others == [[]] * len(others)
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + ranks_together.NORMED["epochs"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(several):
    stops = [torch.load(path, weights_only=False)["stops"] for path in sorted(several.glob("rank-*.pt"))]
    assert all(each == stops[0] for each in stops)
    assert "after step 2 of 3, and saved" in stops[0][0]
    assert "while epoch 2 was measured, and saved" in stops[0][1]
    assert checkpoint.load(several / "half" / "checkpoints" / "last.pt")["state"]["step"] == 5


def test_stopped_twice_it_ends_with_the_same_bits(several, assert_same_outcome):
    assert_same_outcome(Run(several / "normed"), Run(several / "stopped"))


def test_a_run_goes_on_with_fewer_processes_and_with_more(alone, several, tmp_path):
    shutil.copytree(several / "half", tmp_path / "half")
    train(Recipe(**ranks_together.PLAIN), tmp_path / "half", resume=True)
    for path in (tmp_path / "half", several / "begun-alone"):
        assert_near(weights_of(alone / "at"), weights_of(path))
    environments = [Run(path).environment for path in (tmp_path / "half", several / "begun-alone")]
    many = len(list(several.glob("rank-*.pt")))
    assert [(each["ranks"], each["resumed"][0]["ranks"]) for each in environments] == [(many, 1), (1, many)]


@pytest.mark.parametrize("same", [False, True])
def test_a_memory_of_one_ranks_examples_is_refused(toy_data, same):
    from typing import ClassVar

    from at_smooth import AttackSpec, Engine, Regularizer, Threat, create

    class Remembers(Regularizer):
        same_on_all_ranks: ClassVar[bool] = same

        def state(self):
            return {"seen": 1}

    def build(ranks):
        return Engine(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)),
            toy_data(),
            method=create("methods", "at"),
            attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1}),
            regularizer=Remembers(),
            runtime=Runtime.choose("cpu", ranks=ranks),
        )

    build(Ranks())
    if same:
        build(Ranks(0, 2))
    else:
        with pytest.raises(OptionError, match=r"Remembers remembers what it saw.*Train in one process"):
            build(Ranks(0, 2))
