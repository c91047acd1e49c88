import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from at_smooth import Data, OptionError, Recipe, Run, checkpoint, train
from at_smooth import torchrun as torchrun_module
from at_smooth.cli import cli
from at_smooth.commands.interruptible import interruptible
from at_smooth.data import Augmentation
from at_smooth.exceptions import RankLostError
from at_smooth.interruption import SIGNALS
from at_smooth.ranks import Ranks
from at_smooth.runtime import Runtime

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # its recipes name a network in it

import ranks_together  # noqa: E402

SMALL = (
    *("--dataset", "digits", "-D", "pool=100", "--model", "mlp", "-N", "width=8", "-N", "depth=1"),
    *("-A", "steps=2", "--batch-size", "32", "--set", "eval_steps=2", "--device", "cpu"),
)


class Torchrun:
    """Processes that torchrun starts on this machine."""

    def __init__(self, count, *arguments, cache, log):
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "AT_SMOOTH_CACHE": str(cache), "PYTHONPATH": str(HERE)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launcher, *map(str, arguments)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent
            )

    def ranks(self):
        """Process ids, in the order of the ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                of_ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self._process.pid
                names = (folder / "environ").read_bytes().decode().split("\0") if of_ours else []
            except OSError:
                continue
            found.update({int(name[5:]): int(folder.name) for name in names if name.startswith("RANK=")})
        return [found[rank] for rank in sorted(found)]

    def end(self):
        """The exit status, and what was printed before torchrun's own account."""
        try:
            status = self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        text = self._log.read_text()
        ours = [
            line for line in text.splitlines() if line.startswith(("Error", "SIG", "rank", "at:", "Usage", "student"))
        ]
        return status, ours, text

    def wait_for(self, path):
        patience = time.monotonic() + 100
        while not path.exists() and time.monotonic() < patience:
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)

    def kill(self):
        for each in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.kill()


@pytest.fixture
def torchrun(tmp_path, cache):
    """Starts processes, and leaves none behind."""
    started = []

    def start(count, *arguments):
        started.append(Torchrun(count, *arguments, cache=cache, log=tmp_path / f"log-{len(started)}"))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def start_training(torchrun, count, *arguments):
    return torchrun(count, "-m", "at_smooth", "train", *arguments)


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


@pytest.mark.slow
def test_a_signal_is_one_message(torchrun, tmp_path):
    out = tmp_path / "run"
    running = start_training(torchrun, 2, *SMALL, "--epochs", 3000, "--out", out)
    running.wait_for(out / "checkpoints" / "last.pt")
    os.kill(running.ranks()[1], signal.SIGTERM)
    status, lines, text = running.end()
    assert status != 0
    assert [line[:7] for line in lines] == ["at: mlp", "SIGTERM"], text
    assert "and saved; continue with: at-smooth train" in lines[1]
    state = checkpoint.load(out / "checkpoints" / "last.pt")["state"]
    assert state["step"] > 0
    assert not (out / ".lock").exists()


def test_a_rank_that_dies_ends_the_others_with_one_message(torchrun, tmp_path):
    out = tmp_path / "run"
    running = start_training(torchrun, 2, *SMALL, "--epochs", 3000, "--out", out)
    running.wait_for(out / "checkpoints" / "last.pt")
    os.kill(running.ranks()[1], signal.SIGKILL)
    began = time.monotonic()
    status, lines, text = running.end()
    assert time.monotonic() - began < 25
    assert status != 0
    assert [line[:7] for line in lines] == ["at: mlp", "Error: "], text
    assert "another process of this training was lost" in lines[1]
    assert "last.pt, epoch" in lines[1]
    assert f"--out {out} --resume" in lines[1]


def test_a_bad_option_is_one_message(torchrun, tmp_path):
    status, lines, text = start_training(torchrun, 2, "--nonsense", 1, "--out", tmp_path / "run").end()
    assert status != 0
    assert text.count("No such option") == 1, text
    assert len(lines) == 2


@pytest.mark.slow
def test_a_taken_directory_is_one_message(torchrun, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    status, lines, text = start_training(torchrun, 2, *SMALL, "--out", tmp_path / "run").end()
    assert status != 0
    assert lines == [f"Error: {tmp_path / 'run'} exists and is not an empty folder. Choose another --out."], text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_what_is_wrong_with_one_rank_alone_is_said_by_it(torchrun, tmp_path):
    arguments = [*SMALL, "--dataset", "ranks_together:Uneven", "--eps", "0.1", "--out", tmp_path / "run"]
    arguments = [each for each in arguments if each not in ("-D", "pool=100")]
    status, lines, text = start_training(torchrun, 2, *arguments).end()
    assert status != 0
    assert len([line for line in lines if "Error" in line]) == 1, text
    assert lines[-1] == "rank 1: Error: the data differ from those of rank 0. Give every machine the same files."


@pytest.mark.slow
@pytest.mark.parametrize("also", [["--compile"], ["--precision", "bf16", "--method", "trades", "--accumulate", "3"]])
def test_it_trains_with_other_arithmetic_too(torchrun, tmp_path, also):
    status, _, text = start_training(torchrun, 2, *SMALL, "--epochs", 2, *also, "--out", tmp_path / "run").end()
    assert status == 0, text
    assert Run(tmp_path / "run").history[-1]["train_loss"] < 3


@pytest.mark.slow
def test_a_divergence_is_retried_by_all_and_told_once(torchrun, tmp_path):
    also = ["--epochs", 2, "--lr", "1e30", "--on-divergence", "retry"]
    status, lines, text = start_training(torchrun, 2, *SMALL, *also, "--out", tmp_path / "run").end()
    assert status != 0
    assert text.count("Back to the beginning of the epoch") == 3
    assert len([line for line in lines if line.startswith("Error")]) == 1, text
    assert (tmp_path / "run" / "divergence.pt").is_file()


def test_other_commands_work_in_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(cli, ["plugins"])
    assert result.exit_code == 2
    assert "'plugins' works in one process" in result.output


def test_of_what_all_ranks_find_at_once_only_the_first_tells(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for wrong in (["train", "--nonsense"], ["train", "--override"], ["plugins"]):
        result = CliRunner().invoke(cli, wrong)
        assert (result.exit_code, result.output) == (2, "")


def test_after_a_loss_signals_are_ignored_whoever_had_them(monkeypatch):
    monkeypatch.setattr(torchrun_module, "ranks_started", lambda: Ranks(0, 2))
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with (
            pytest.raises(RankLostError, match=r"was lost.*Nothing yet"),
            interruptible(lambda: "nothing yet"),
            torchrun_module.losses_told(),
        ):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_another_error_of_torch_is_no_loss(monkeypatch):
    monkeypatch.setattr(torchrun_module, "ranks_started", lambda: Ranks(0, 2))
    with pytest.raises(RuntimeError, match="out of memory"), torchrun_module.losses_told():
        raise RuntimeError("CUDA out of memory")


SEVERAL_TRAININGS = """
from at_smooth import Recipe, train
for seed in range(3):
    recipe = Recipe(dataset="digits", dataset_options={"pool": 100}, model="mlp", attack_options={"steps": 1},
                    epochs=1, eval_steps=1, device="cpu", seed=seed)
    train(recipe, f"run-{seed}")
"""


@pytest.mark.slow
def test_a_script_trains_several_times(torchrun, tmp_path):
    script = tmp_path / "several.py"
    script.write_text(SEVERAL_TRAININGS)
    status, _, text = torchrun(2, script).end()
    assert status == 0, text
    assert all(Run(tmp_path / f"run-{seed}").finished for seed in range(3))


LAST_WORK = """
import time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from at_smooth.torchrun import process_group

class LongToFree:
    def __del__(self):
        time.sleep(0.5)

with process_group() as ranks:
    shared = DistributedDataParallel(torch.nn.Linear(1, 1))
    shared.me = shared  # a cycle, as an engine makes
    numbers = torch.tensor(1)
    numbers.note = LongToFree()
    if ranks.first:
        time.sleep(0.3)  # so that a thread of the other's is the last to hold its numbers
    dist.all_reduce(numbers, async_op=True)
    del numbers, shared
"""


def test_threads_of_the_group_end_before_python_does(torchrun, tmp_path):
    script = tmp_path / "last.py"
    script.write_text(LAST_WORK)
    status, _, text = torchrun(2, script).end()
    assert status == 0, text


FAILING = """
import os
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from at_smooth.torchrun import process_group

def fail():
    shared = DistributedDataParallel(torch.nn.Linear(1, 1))
    raise ValueError

try:
    with process_group():
        fail()
except ValueError as error:  # it holds the frames of what failed
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert error and not [name for name in names if "gloo" in name], names
"""


def test_they_end_where_something_failed_too(torchrun, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    status, _, text = torchrun(2, script).end()
    assert status == 0, text


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
