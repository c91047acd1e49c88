import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from at_smooth import RunError, lock, train
from at_smooth.exceptions import RunDirectoryGoneError
from at_smooth.lock import NAME, FileLock, FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from at_smooth.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    with pytest.raises(RunError, match=rf"run is being trained by another process \(process {holder.pid} on"):
        FolderLock(tmp_path / "run").__enter__()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_owner(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()  # the file outlives it, the lock does not
    with FolderLock(tmp_path / "run"):
        assert (tmp_path / "run" / NAME).read_text().startswith(str(os.getpid()))


def test_nothing_is_left_of_it(tmp_path):
    (tmp_path / "theirs").mkdir()
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        with FolderLock(folder):
            assert os.listdir(folder) == [NAME]
    assert os.listdir(tmp_path) == ["theirs"]
    assert not os.listdir(tmp_path / "theirs")


def test_one_at_a_time_where_many_try_at_once(tmp_path):
    inside, most, got = [], [], []

    def attempt():
        for _ in range(200):
            try:
                with FolderLock(tmp_path / "run"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    got.append(1)
            except RunError:
                pass

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got
    assert max(most) == 1


def test_a_run_in_use_is_refused_and_left_alone(tiny, tmp_path, holder, contents):
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="another process"):
        train(tiny(), tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_what_a_killed_owner_leaves_is_removed_and_what_is_held_stays(holder, tmp_path):
    left = FileLock(tmp_path / "run" / NAME)
    left.remove_leftover()
    assert left.path.read_text().startswith(f"{holder.pid} ")
    holder.kill()
    holder.wait()
    left.remove_leftover()
    assert not left.path.exists()


def test_without_locks_nobody_is_refused_and_no_file_removed_that_may_be_anothers(tmp_path, monkeypatch):
    def unsupported(number):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", unsupported)
    with FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run"):
        FileLock(tmp_path / "run" / NAME).remove_leftover()
        assert (tmp_path / "run" / NAME).exists()


@pytest.mark.parametrize("meanwhile", ["nothing", "another run"])
@pytest.mark.parametrize("gone", ["moved", "deleted"])
def test_a_folder_that_is_gone_is_noticed_and_what_is_in_its_place_left_alone(tmp_path, gone, meanwhile):
    place = tmp_path / "run"
    with FolderLock(place) as held:
        held.check()
        shutil.move(place, tmp_path / "elsewhere")
        if gone == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        if meanwhile == "another run":
            place.mkdir()
            (place / NAME).write_text("another's")
        with pytest.raises(RunDirectoryGoneError, match="run is gone"):
            held.check()
    assert place.exists() == (meanwhile == "another run")
    assert not place.exists() or os.listdir(place) == [NAME]


@pytest.mark.slow
def test_the_command_refuses_a_second_process_and_not_the_next(command, tmp_path):
    options = ["-D", "pool=100", "-N", "width=8", "-A", "steps=2", "--epochs", "100000", "--test-every", "0"]
    first = command("train", *options, "--out", tmp_path / "run")
    while first.poll() is None and not (tmp_path / "run" / "checkpoints" / "last.pt").is_file():
        time.sleep(0.05)
    second = command("train", "--out", tmp_path / "run", "--resume")
    _, errors = second.communicate()
    assert first.poll() is None
    assert second.returncode == 2
    assert f"process {first.pid} on" in errors
    first.kill()
    first.communicate()
    third = command("train", "--out", tmp_path / "run", "--resume")
    while third.poll() is None and f"{third.pid} " not in _read(tmp_path / "run" / NAME):
        time.sleep(0.05)
    assert third.poll() is None
    third.send_signal(signal.SIGINT)
    _, errors = third.communicate()
    assert third.returncode == 130
    assert "--resume" in errors


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ""
