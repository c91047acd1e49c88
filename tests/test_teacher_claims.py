"""Runs that want the same self-teacher at once: one trains it, the others wait; and what killed ones leave behind."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from at_smooth import Run, load_data, teachers, train
from at_smooth.progress import Silent
from at_smooth.teacher_cache import CachedTeacher
from at_smooth.teachers import teacher_key, teacher_recipe

OWNER = """
import sys
from at_smooth.teacher_cache import CachedTeacher
teacher = CachedTeacher(sys.argv[1])
assert teacher.claim()
print("claimed", flush=True)
sys.stdin.read()
teacher.release()
"""


class Noting(Silent):
    """Keeps what is noted, and does something when a run begins to wait."""

    def __init__(self, act):
        self.notes, self._act = [], act

    def note(self, text):
        self.notes.append(text)
        if "waiting for it" in text:
            self._act()


@pytest.fixture
def recipe(tiny):
    return tiny(regularizer="kd-adv")


@pytest.fixture
def name(recipe, plain_run):
    """The name of its teacher in the cache."""
    return teacher_key(teacher_recipe(recipe, "at"), load_data(plain_run.path).fingerprint())


@pytest.fixture
def owner(name, cache):
    """Another process that has the claim to train the teacher."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(params=[0.0, 100.0], ids=["in rounds", "at once"])
def _rounds(request, monkeypatch):
    monkeypatch.setattr(teachers, "_ROUND", request.param)


@pytest.mark.usefixtures("_rounds")
def test_the_claim_of_one_that_died_is_taken_over(recipe, owner, tmp_path, cache, assert_same_outcome):
    waited = Noting(owner.kill)
    run = train(recipe, tmp_path / "run", progress=waited)
    where = f"process {owner.pid} on {os.uname().nodename}"
    assert waited.notes == [
        f"self-teacher 'at': {where} trains the same one for another run; waiting for it",
        "self-teacher 'at': trained first, then cached",
    ]
    assert [path.name[0] for path in (cache / "teachers").iterdir()] != ["."]
    shutil.rmtree(cache)
    assert_same_outcome(run, train(recipe, tmp_path / "alone"))


@pytest.mark.usefixtures("_rounds")
def test_what_the_owner_has_finished_is_taken(recipe, name, owner, tmp_path, cache, monkeypatch, assert_same_outcome):
    with monkeypatch.context() as patch:
        patch.setenv("AT_SMOOTH_CACHE", str(tmp_path / "another"))
        first = train(recipe, tmp_path / "first")
    waited = Noting(lambda: shutil.copytree(tmp_path / "another" / "teachers" / name, cache / "teachers" / name))
    run = train(recipe, tmp_path / "run", progress=waited)
    assert "reused from the cache" in waited.notes[1]
    assert owner.poll() is None
    assert_same_outcome(first, run)


def test_waiting_ends_by_ctrl_c(recipe, owner, tmp_path):
    waited = Noting(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", progress=waited)
    owner.kill()
    owner.wait()
    assert train(recipe, tmp_path / "run", resume=True).finished


def test_what_is_half_trained_is_continued_whoever_trains_the_same(tiny, stopped_run, name, owner, tmp_path, cache):
    shutil.rmtree(cache)  # so that the owner's claim is not in the way of the first start
    recipe, path = stopped_run(stop="at teacher", regularizer="kd-adv")
    claim = CachedTeacher(name)
    assert claim.claim()
    noted = Noting(lambda: pytest.fail("it has its own"))
    assert train(recipe, path, resume=True, progress=noted).finished
    assert noted.notes == ["self-teacher 'at': continued"]
    assert not claim.finished  # its owner will publish it
    claim.release()


def leave_half_published(cache, name):
    part = cache / "teachers" / f".{name}.{2**22 + 1}.part"  # no process has such a number
    (part / "checkpoints").mkdir(parents=True)
    (part / "checkpoints" / "best.pt").write_bytes(b"half")
    return part


def test_what_a_killed_process_left_half_published_is_removed(recipe, tmp_path, cache):
    left = [leave_half_published(cache, each) for each in ("digits-mlp-at-0123", "npz-a.b_c-standard-4567")]
    train(recipe, tmp_path / "run")
    assert not [part for part in left if part.exists()]
    assert len(list((cache / "teachers").iterdir())) == 1


def test_what_a_living_process_publishes_is_left_alone(tiny, name, owner, tmp_path, cache):
    part = leave_half_published(cache, name)
    train(tiny(regularizer="kd-std"), tmp_path / "run")
    assert (part / "checkpoints" / "best.pt").read_bytes() == b"half"
    assert CachedTeacher(name).claim() is False


PUBLISHER = """
import os, shutil, sys
from pathlib import Path
from at_smooth import teacher_cache

def killed(source, target, copy=teacher_cache.copy_file):
    copy(source, target)
    if target.name == "best.pt":
        os.kill(os.getpid(), 9)

teacher_cache.copy_file = killed
teacher_cache.CachedTeacher(sys.argv[1]).publish(Path(sys.argv[2]))
"""


def test_sigkill_in_the_middle_of_publishing_leaves_nothing_for_long(recipe, name, plain_run, tmp_path, cache):
    killed = subprocess.run([sys.executable, "-c", PUBLISHER, name, str(plain_run.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((cache / "teachers").iterdir())) == 2  # a lock, and half a teacher
    train(recipe, tmp_path / "run")
    assert [path.name for path in (cache / "teachers").iterdir()] == [name]


def test_the_lock_of_a_killed_run_goes_when_it_is_started_again(recipe, tmp_path):
    run = train(recipe, tmp_path / "run")
    for left in (run.path / ".lock", run.path / "teachers" / "at" / ".lock"):
        left.write_text("123 nowhere")
        train(recipe, run.path, resume=True)
    assert not (run.path / ".lock").exists()
    assert Run(run.path).finished
