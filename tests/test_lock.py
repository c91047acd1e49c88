import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from at_smooth import RunError, train
from at_smooth.lock import NAME, locked

HOLDER = """
import sys, time
from pathlib import Path
from at_smooth.lock import locked
with locked(Path(sys.argv[1])):
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
        locked(tmp_path / "run").__enter__()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_owner(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()  # the file outlives it, the lock does not
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / NAME).read_text().startswith(str(os.getpid()))


def test_nothing_is_left_of_it(tmp_path):
    (tmp_path / "theirs").mkdir()
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        with locked(folder):
            assert os.listdir(folder) == [NAME]
    assert os.listdir(tmp_path) == ["theirs"]
    assert not os.listdir(tmp_path / "theirs")


def test_one_at_a_time_where_many_try_at_once(tmp_path):
    inside, most, got = [], [], []

    def attempt():
        for _ in range(200):
            try:
                with locked(tmp_path / "run"):
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
