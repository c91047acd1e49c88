"""How a training of several processes ends, and what it says then."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from at_smooth import Run, checkpoint, early_words
from at_smooth import torchrun as torchrun_module
from at_smooth.cli import cli
from at_smooth.commands.interruptible import interruptible
from at_smooth.exceptions import DivergedError, Interrupted, OptionError, RankLostError, exit_code_of
from at_smooth.interruption import SIGNALS
from at_smooth.ranks import Ranks

sys.path.append(str(Path(__file__).parent))

from launcher import Torchrun, hear_ctrl_c

SMALL = (
    *("--dataset", "digits", "-D", "pool=100", "--model", "mlp", "-N", "width=8", "-N", "depth=1"),
    *("-A", "steps=2", "--batch-size", "32", "--set", "eval_steps=2", "--device", "cpu"),
)


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


@contextmanager
def adopting():
    """Let processes whose parent dies become children of this one, which can wait for them."""
    adopt = partial(ctypes.CDLL(None).prctl, 36)  # PR_SET_CHILD_SUBREAPER
    adopt(1)
    try:
        yield
    finally:
        adopt(0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_ranks_that_torchrun_left_alone_save_and_stop(torchrun, tmp_path, count):
    out = tmp_path / "run"
    with adopting():
        running = start_training(torchrun, count, *SMALL, "--epochs", 100000, "--test-every", 0, "--out", out)
        running.wait_for(out / "checkpoints" / "last.pt")
        ranks = running.ranks()
        running.kill_launcher()
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert codes == [143] * count
    _, lines, text = running.end()
    assert [line[:7] for line in lines] == ["at: mlp", "SIGTERM"], text
    assert "SIGTERM: torchrun is gone; stopped " in text  # in an epoch, or while one was measured
    assert "TCPStore" not in text
    assert f"and saved; continue with: at-smooth train --out {out} --resume" in lines[1]
    assert checkpoint.load(out / "checkpoints" / "last.pt")["state"]["step"] > 0
    assert not (out / ".lock").exists()


CLAIMED = """
import sys
from pathlib import Path
from at_smooth import Recipe, load_data, train
from at_smooth.teacher_cache import CachedTeacher
from at_smooth.teachers import teacher_key, teacher_recipe
run = train(Recipe.from_yaml(Path(sys.argv[1])), "plain")
recipe = run.recipe.replacing(regularizer="kd-adv")
assert CachedTeacher(teacher_key(teacher_recipe(recipe, "at"), load_data("plain").fingerprint())).claim()
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["the owner dies", "torchrun dies"])
def test_ranks_wait_together_for_a_teacher_that_another_process_trains(torchrun, tmp_path, cache, end):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{dataset: digits, dataset_options: {pool: 100}, model: mlp, model_options: {width: 8, depth: 1}, epochs: 2,"
        "attack_options: {steps: 2}, batch_size: 32, eval_steps: 2, device: cpu}"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    owner = subprocess.Popen([sys.executable, "-c", CLAIMED, str(recipe)], cwd=tmp_path, **pipes)
    assert owner.stdout.readline() == "claimed\n"
    arguments = ["--recipe", recipe, "--regularizer", "kd-adv", "--out", tmp_path / "run"]
    with adopting():
        running = start_training(torchrun, 2, *arguments)
        running.wait_for_words(f"process {owner.pid} on ")
        if end == "torchrun dies":
            ranks = running.ranks()
            running.kill_launcher()
            assert [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks] == [143] * 2
    if end == "the owner dies":
        time.sleep(6)  # longer than a round
        owner.kill()
        status, _, text = running.end()
        assert status == 0, text
        assert "trained first, then cached" in text
        assert Run(tmp_path / "run").finished
    else:
        _, lines, text = running.end()
        assert [line[:7] for line in lines] == ["at + kd", "SIGTERM"], text
        assert "torchrun is gone; stopped, waiting for the self-teacher 'at'" in text
    owner.kill()
    owner.communicate()


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
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_wrong_with_one_rank_alone_is_said_by_it(torchrun, tmp_path, count):
    arguments = [*SMALL, "--dataset", "ranks_together:Uneven", "--eps", "0.1", "--out", tmp_path / "run"]
    arguments = [each for each in arguments if each not in ("-D", "pool=100")]
    status, lines, text = start_training(torchrun, count, *arguments).end()
    assert status != 0
    assert lines[1:] == [
        f"rank {count - 1}: Error: the data differ from those of rank 0. Give every machine the same files."
    ], text


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


FIRST_IS_SLOW = """
import os
import time
from at_smooth.cli import cli

time.sleep(2 if os.environ["RANK"] == "0" else 0)
cli()
"""


@pytest.mark.parametrize("wrong", [["train", "--override"], ["--nonsense", "train"]])
def test_what_all_find_before_they_meet_is_said_by_the_first_however_slow(torchrun, tmp_path, wrong):
    script = tmp_path / "slow.py"
    script.write_text(FIRST_IS_SLOW)
    status, lines, text = torchrun(2, script, *wrong).end()
    assert status != 0
    assert [line[:6] for line in lines if line[:5] != "Usage"] == ["Error:"], text


NOBODY_BEGINS = """
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from at_smooth.cli import cli
from at_smooth.commands import train

def arrived():
    Path(f"arrived-{os.environ['RANK']}").touch()

def before_they_meet(given):
    arrived()
    time.sleep(100)

meeting = import_module("torch.distributed.rendezvous")

def meet(*arguments, met=meeting.rendezvous, **options):
    arrived()
    yield from met(*arguments, **options)

if os.environ["RANK"] in sys.argv.pop(1):
    train.changes_from = before_they_meet
meeting.rendezvous = meet
cli()
"""


@pytest.mark.parametrize(("absent", "said"), [("01", 1), ("0", 1), ("1", 0)])
def test_ctrl_c_before_they_meet_is_one_message_at_most(torchrun, tmp_path, absent, said):
    script = tmp_path / "nobody.py"
    script.write_text(NOBODY_BEGINS)
    running = torchrun(2, script, absent, "train")
    for rank in range(2):
        running.wait_for(tmp_path / f"arrived-{rank}")
    running.interrupt()
    began = time.monotonic()
    status, lines, text = running.end()
    assert time.monotonic() - began < 25  # after 30 seconds torchrun kills who does not listen
    assert status != 0
    assert lines == ["SIGINT: stopped before anything began"] * said, text
    assert "KeyboardInterrupt" not in text


EARLY = """
import sys
import time
from at_smooth.cli import cli

def sleep(seconds, slept=time.sleep):
    print("waiting", flush=True)
    slept(seconds)

time.sleep = sleep
try:
    cli(["plugins"])
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


def early(rank, local):
    environment = {**os.environ, "LOCAL_RANK": str(local), "RANK": str(rank), "WORLD_SIZE": "4"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", EARLY], env=environment, text=True, preexec_fn=hear_ctrl_c, **pipes)


@pytest.mark.parametrize(("rank", "number"), [(0, ""), (2, "rank 2: ")])
def test_before_torch_is_there_the_first_of_a_machine_speaks_without_it(rank, number):
    out, words = early(rank, local=0).communicate()
    assert out.split() == ["2", "False"]
    assert words == f"{number}Error: 'plugins' works in one process; torchrun is for 'train'. Start it alone.\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_others_wait_in_silence_until_they_are_ended(number):
    waiting = early(3, local=1)
    assert waiting.stdout.readline() == "waiting\n"
    waiting.send_signal(number)
    assert waiting.communicate() == ("", "")
    assert waiting.returncode == -number


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(["train", "--nonsense"], "Usage: "), (["train", "--override"], "rank 1: "), (["plugins"], "rank 1: ")],
)
def test_who_waits_for_the_first_in_vain_speaks(monkeypatch, wrong, words):
    monkeypatch.setattr(early_words, "_SILENCE", 0)
    monkeypatch.setattr(torchrun_module, "_store", [])
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    before = [signal.getsignal(number) for number in SIGNALS]
    result = CliRunner().invoke(cli, wrong)
    assert result.exit_code == 2
    assert result.output.startswith(words)
    assert result.output.count("Error: ") == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 1),
        (OptionError(), 2),
        (OSError(), 2),
        (DivergedError("loss"), 3),
        (RankLostError(), 5),
        (KeyboardInterrupt(), 130),
        (Interrupted(signal.SIGTERM, "stopped"), 143),
    ],
)
def test_followers_know_what_a_rank_exits_with(error, code):
    assert exit_code_of(error) == code


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


@pytest.mark.slow
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

def give_up():
    try:
        fail()
    except ValueError:  # whose frames are held by what comes of it, beside the cause
        raise KeyError from TypeError()

try:
    with process_group():
        give_up()
except KeyError as error:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert error and not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow
def test_they_end_where_something_failed_too(torchrun, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    status, _, text = torchrun(2, script).end()
    assert status == 0, text


@pytest.mark.slow
def test_ranks_trust_what_the_first_trusts(torchrun, tmp_path, state):
    (tmp_path / "netmod.py").write_text(
        "from torch import nn\n"
        "def make(shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], num_classes))\n"
    )
    (tmp_path / "recipe.yaml").write_text("model: netmod:make\n")
    small = [*SMALL[:4], *SMALL[10:], "-A", "steps=1", "--regularizer", "kd-adv", "--epochs", 1]

    def train(out, *arguments):
        return start_training(torchrun, 2, "--out", tmp_path / out, *arguments).end()

    status, lines, text = train("refused", "--recipe", tmp_path / "recipe.yaml", *small)
    assert status != 0, text
    assert ["--trust netmod:make" in line for line in lines] == [True], text
    status, _, text = train("run", "--recipe", tmp_path / "recipe.yaml", *small, "--trust", "netmod:make")
    assert status == 0, text
    assert (state / "trusted.jsonl").read_text().count("netmod") == 2  # the name and the file, once
    (tmp_path / "run" / "summary.json").unlink()
    status, _, text = train("run", "--resume")
    assert status == 0, text
    assert Run(tmp_path / "run").finished
