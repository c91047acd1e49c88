"""A run that is cut short anywhere and resumed ends as the run left alone, bit for bit on the CPU."""

import errno
import itertools
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager

import click
import pytest
import torch
from click.testing import CliRunner

from at_smooth import CheckpointError, Interrupted, Observer, Run, RunError, StorageError, checkpoint, registry, train
from at_smooth import run as run_module
from at_smooth.cli import cli
from at_smooth.commands.interruptible import interruptible
from at_smooth.progress import Silent
from at_smooth.teacher_cache import cache_directory

AUGMENTED = {"pool": 100, "crop": 1, "flip": True, "rotation": 10}


class At(Silent, Observer):
    """Does something at the n-th time that an event happens in one training."""

    def __init__(self, event, number, act, role="student"):
        self._left, self._act, self._role = number, act, role
        setattr(self, event, self._count)

    @contextmanager
    def phase(self, role, recipe, path):
        yield self if role == self._role else Observer()

    def _count(self, engine, *news):
        self._left -= 1
        if self._left == 0:
            self._act()


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("event", "moment", "smoother", "words"),
    [
        ("stepped", 1, "iswa", "in epoch 1, after step [12] of 3, and saved"),
        ("stepped", 3, "ema", "epoch 1"),  # the last step of an epoch
        ("stepped", 8, "iswa", "in epoch 3"),
        ("measured", 2, "swa", "while epoch 1 was measured"),
        ("measured", 4, "swa", "while epoch 2 was measured"),  # in the pass for BatchNorm statistics
    ],
)
def test_a_signal_saves_within_the_step_in_hand(
    tiny, tmp_path, assert_same_outcome, number, event, moment, smoother, words
):
    recipe = tiny(smoother=smoother, dataset_options=AUGMENTED, test_every=2)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted, match=words) as caught:
        train(recipe, tmp_path / "run", progress=At(event, moment, signalled(number)))
    assert caught.value.signal_number == number
    assert_same_outcome(whole, train(recipe, tmp_path / "run", resume=True))


@pytest.mark.parametrize("smoother", ["swa", "ema", "iswa"])
def test_a_run_may_be_stopped_again_and_again(tiny, tmp_path, assert_same_outcome, smoother):
    recipe = tiny(smoother=smoother, epochs=2, smoother_options={"start": 0}, eval_steps=1)
    whole = train(recipe, tmp_path / "whole")
    resumed, stops = False, 0
    while not resumed or not Run(tmp_path / "run").finished:
        try:
            run = train(recipe, tmp_path / "run", resume=resumed, progress=At("stepped", 1, signalled(signal.SIGINT)))
        except Interrupted:
            stops += 1
        resumed = True
    assert stops >= 3  # six steps
    assert_same_outcome(whole, run)


def test_a_teacher_is_stopped_and_continued_likewise(tiny, tmp_path, cache, monkeypatch, assert_same_outcome):
    recipe = tiny(regularizer="kd-adv")
    progress = At("stepped", 5, signalled(signal.SIGTERM), role="at teacher")
    with pytest.raises(Interrupted, match="in epoch 2"):
        train(recipe, tmp_path / "run", progress=progress)
    assert not list((cache / "teachers").iterdir())
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert_same_outcome(train(recipe, tmp_path / "other"), resumed)
    monkeypatch.setenv("AT_SMOOTH_CACHE", str(tmp_path / "another-cache"))
    assert_same_outcome(train(recipe, tmp_path / "whole"), resumed)


def test_a_second_signal_is_not_kept_waiting(tiny, tmp_path):
    def twice():
        signalled(signal.SIGINT)()
        signalled(signal.SIGINT)()
        pytest.fail("the second one was to stop at once")

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(), tmp_path / "run", progress=At("stepped", 2, twice))
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back(tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tiny(epochs=1), tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_long_epoch_is_saved_now_and_then(tiny, tmp_path, monkeypatch, assert_same_outcome):
    whole = train(tiny(smoother="ema"), tmp_path / "whole")
    monkeypatch.setattr(run_module, "_SAVE_EVERY", 0)

    def die():
        raise SystemExit

    with pytest.raises(SystemExit):
        train(tiny(smoother="ema"), tmp_path / "run", progress=At("stepped", 5, die))
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["state"]
    assert (state["epoch"], state["underway"]["batches"]) == (1, 2)
    assert_same_outcome(whole, train(tiny(smoother="ema"), tmp_path / "run", resume=True))


class KilledError(BaseException):
    """The process is gone."""


def break_at(monkeypatch, number, action):
    """Let the n-th replacement of a file fail, or die just after it; says how many there were."""
    replace, count = os.replace, itertools.count(1)
    seen = []

    def replacing(source, target):
        seen.append(target)
        if next(count) == number and action == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)
        if len(seen) == number and action == "killed":
            raise KilledError

    monkeypatch.setattr(os, "replace", replacing)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "changes"),
    [
        ("killed", {"smoother": "swa"}),
        ("full disk", {"smoother": "swa"}),
        pytest.param("killed", {"regularizer": "kd-adv", "epochs": 2}, marks=pytest.mark.slow),
        pytest.param("full disk", {"regularizer": "kd-adv", "epochs": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_between_any_two_writes_a_run_can_break_off(tiny, tmp_path, monkeypatch, action, changes, assert_same_outcome):
    recipe = tiny(**{"epochs": 3, "eval_steps": 1, "test_every": 2, "keep_checkpoints": 2, **changes})
    caches = (str(tmp_path / f"cache-{number}") for number in itertools.count())
    with monkeypatch.context() as patch:
        patch.setenv("AT_SMOOTH_CACHE", next(caches))
        seen = break_at(patch, 0, action)
        whole = train(recipe, tmp_path / "counted")
        writes = len(seen)
    assert writes > 12
    for number in range(1, writes + 1):
        monkeypatch.setenv("AT_SMOOTH_CACHE", next(caches))
        path = tmp_path / f"run-{number}"
        with monkeypatch.context() as patch:
            seen = break_at(patch, number, action)
            error = None
            try:
                train(recipe, path)
            except (KilledError, StorageError) as caught:
                error = caught
        if isinstance(error, StorageError):
            assert f"cannot write {seen[-1]}" in str(error)
            assert "No space left on device" in str(error)
        elif error is None:
            assert "cache" in str(seen[number - 1])  # which is no obstacle where it cannot be written
        begun = (path / "recipe.yaml").is_file()
        if begun and (path / "checkpoints" / "last.pt").is_file():
            assert checkpoint.load(path / "checkpoints" / "last.pt")["state"]["epoch"] > 0
        assert_same_outcome(whole, train(recipe, path, resume=begun))
        assert not list(path.rglob("*.part"))
        assert not list(path.rglob(".lock"))


def in_a_process(work):
    """Start a real process that does some work; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


own = [
    (regularizer.name, smoother.name)
    for regularizer, smoother in itertools.product(registry.entries("regularizers"), registry.entries("smoothers"))
    if regularizer.distribution == smoother.distribution == "at-smooth"
]


def test_what_was_killed_before_there_was_a_run_leaves_nothing_behind(tiny, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".recipe.yaml.123.part").write_text("dataset: dig")
    assert train(tiny(epochs=1), path).finished
    assert not list(path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(("regularizer", "smoother"), own)
def test_a_process_killed_at_random_moments_is_resumed_exactly(
    tiny, tmp_path, monkeypatch, regularizer, smoother, assert_same_outcome
):
    recipe = tiny(regularizer=regularizer, smoother=smoother, dataset_options=AUGMENTED, epochs=6)
    moments = random.Random(f"{regularizer} {smoother}")
    whole = train(recipe, tmp_path / "whole")
    began = time.perf_counter()
    train(recipe, tmp_path / "timed")  # the first training of a process also imports, which its forks need not do again
    seconds = time.perf_counter() - began
    monkeypatch.setenv("AT_SMOOTH_CACHE", str(tmp_path / "cache"))
    path, kills, attempts = tmp_path / "run", 0, 0
    while kills < 3:
        child = in_a_process(lambda: train(recipe, path, resume=(path / "recipe.yaml").is_file()))
        time.sleep(moments.uniform(0.02, 0.6) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        attempts += 1
        kills += os.WIFSIGNALED(status)
        if attempts > 20 or (path / "summary.json").is_file():
            break
    assert kills >= 1
    run = train(recipe, path, resume=(path / "recipe.yaml").is_file())
    assert_same_outcome(whole, run)
    assert not list(path.rglob("*.part"))


def test_a_harmless_difference_is_named_and_accepted_with_override(stopped_run):
    recipe, path = stopped_run()
    other = recipe.replacing(threads=2, keep_checkpoints=2)
    with pytest.raises(RunError, match=r"keep_checkpoints was 0, is now 2.*--override") as caught:
        train(other, path, resume=True)
    assert "threads was 1, is now 2" in str(caught.value)
    run = train(other, path, resume=True, override=True)
    assert run.finished
    assert run.snapshot(4).is_file()
    assert run.recipe == recipe  # what it was begun with


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"), [({"lr": 0.05}, "lr was 0.1, is now 0.05"), ({"epochs": 9}, "epochs was 4, is now 9")]
)
def test_what_makes_another_experiment_is_refused_with_or_without_override(
    tiny, stopped_run, contents, changes, words, override
):
    _, path = stopped_run()
    before = contents(path)
    with pytest.raises(RunError, match=words):
        train(tiny(**changes), path, resume=True, override=override)
    assert contents(path) == before


SOURCE = """
from at_smooth import Regularizer

class Other(Regularizer):
    '{}'

    def targets(self, labels, num_classes):
        return labels
"""


def test_another_version_of_a_plugin_is_named_and_accepted_with_override(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "changing_plugin.py"
    module.write_text(SOURCE.format("one"))
    recipe = tiny(regularizer="changing_plugin:Other", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", progress=At("stepped", 4, signalled(signal.SIGINT)))
    module.write_text(SOURCE.format("another"))
    with pytest.raises(RunError, match=r"regularizer changing_plugin:Other was .* is now .*--override"):
        train(recipe, tmp_path / "run", resume=True)
    run = train(recipe, tmp_path / "run", resume=True, override=True)
    assert run.finished
    assert len(run.environment["resumed"]) == 1


@pytest.mark.parametrize("package", ["torch", "at-smooth"])
def test_other_versions_are_named(stopped_run, package):
    recipe, path = stopped_run()
    last = path / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    now = content["versions"][package]
    content["versions"][package] = "0.0.1"
    checkpoint.save(last, content)
    with pytest.raises(RunError, match=f"{package} was 0.0.1, is now {now}"):
        train(recipe, path, resume=True)


def test_best_weights_that_are_missing_or_of_another_epoch_are_refused(stopped_run):
    recipe, path = stopped_run(after=3, lr=1e-9)  # nothing improves after the first epoch
    best = path / "checkpoints" / "best.pt"
    content = checkpoint.load(best)
    assert content["row"]["epoch"] == 1
    content["row"]["epoch"] = 2
    checkpoint.save(best, content)
    with pytest.raises(CheckpointError, match=r"best\.pt is of epoch 2, and the run's best so far is epoch 1"):
        train(recipe, path, resume=True)
    best.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*best\.pt"):
        train(recipe, path, resume=True)


def test_two_runs_of_a_recipe_are_the_same_to_the_bit(tiny, tmp_path, assert_same_outcome):
    recipe = tiny(smoother="ema", dataset_options=AUGMENTED, method="trades")
    torch.rand(7)  # whatever was drawn before
    one = train(recipe, tmp_path / "one")
    torch.rand(3)
    assert_same_outcome(one, train(recipe, tmp_path / "two"))


def test_deterministic_holds_during_training_and_not_after(tiny, tmp_path):
    seen = []
    progress = At("stepped", 1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    train(tiny(epochs=1, deterministic=True), tmp_path / "run", progress=progress)
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert Run(tmp_path / "run").recipe.deterministic


@pytest.mark.parametrize(("part", "name"), [("model", "normalize.std"), ("smoother", "module.normalize.std")])
def test_integers_in_the_place_of_floats_are_refused(stopped_run, part, name):
    recipe, path = stopped_run(after=3, smoother="swa")
    last = path / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    content["state"][part][name] = content["state"][part][name].to(torch.int64)  # torch would round, here to 0
    checkpoint.save(last, content)
    with pytest.raises(CheckpointError, match=rf"last.pt.*{name} is torch.int64, not torch.float32"):
        train(recipe, path, resume=True)


@pytest.mark.parametrize("role", ["student", "at teacher"])
def test_a_run_that_is_moved_away_says_so_and_goes_on_elsewhere(tiny, tmp_path, assert_same_outcome, role):
    recipe, place = tiny(regularizer="kd-adv"), tmp_path / "run"
    whole = train(recipe, tmp_path / "whole")
    shutil.rmtree(cache_directory())
    moving = At("stepped", 8, lambda: place.rename(tmp_path / "moved"), role)
    with (
        pytest.raises(StorageError, match=rf"the run directory {place} is gone: .*--out NEW_PLACE --resume") as caught,
        interruptible(lambda: "advice"),
    ):
        train(recipe, place, progress=moving)
    assert not any(words in str(caught.value) for words in ("Make room", "advice", "stands", "Nothing had been saved"))
    assert not place.exists()
    assert_same_outcome(whole, train(recipe, tmp_path / "moved", resume=True))


def test_a_new_run_in_its_place_is_not_written_into(tiny, tmp_path, contents):
    place = tmp_path / "run"
    other = train(tiny(seed=1), tmp_path / "other")

    def exchange():
        place.rename(tmp_path / "moved")
        other.path.rename(place)

    before = {path.name: content for path, content in contents(other.path).items()}
    with pytest.raises(StorageError, match="is gone"):
        train(tiny(), place, progress=At("stepped", 8, exchange))
    assert {path.name: content for path, content in contents(place).items()} == before


def test_a_second_ctrl_c_does_not_cost_the_advice(tiny, tmp_path):
    def twice():
        signalled(signal.SIGINT)()
        signalled(signal.SIGINT)()

    def advice():
        signalled(signal.SIGINT)()  # and a third
        return "go on so"

    with pytest.raises(Interrupted, match=r"^stopped; go on so$"), interruptible(advice):
        train(tiny(), tmp_path / "run", progress=At("stepped", 2, twice))
    with pytest.raises(Interrupted, match=r"epoch 1, .*saved; go on so$"), interruptible(advice):
        train(tiny(), tmp_path / "run", resume=True, progress=At("stepped", 1, signalled(signal.SIGINT)))


def test_a_ctrl_c_after_the_advice_does_not_take_it_back():
    @click.command()
    def stopped():
        try:
            raise Interrupted(signal.SIGTERM, "stopped; go on so")
        finally:
            raise KeyboardInterrupt

    group = type(cli)("group", commands={"stopped": stopped})
    result = CliRunner().invoke(group, ["stopped"])
    assert (result.exit_code, result.stderr) == (143, "SIGTERM: stopped; go on so\n")
