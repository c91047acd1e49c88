"""Whatever cannot be written, the last good checkpoint stands and the message says so."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from at_smooth import Run, StorageError, checkpoint, train

resource = pytest.importorskip("resource")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        sys.platform == "linux"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tiny, small_disk, tmp_path, assert_same_outcome):
    recipe = tiny(epochs=30, eval_steps=1, keep_checkpoints=1)
    whole = train(recipe, tmp_path / "whole")
    path = small_disk / "run"
    with pytest.raises(
        StorageError, match=r"cannot write .*No space left on device.*last good checkpoint stands"
    ) as it:
        train(recipe, path)
    last = checkpoint.load(path / "checkpoints" / "last.pt")["state"]
    assert last["epoch"] > 1
    assert f"epoch {last['epoch']}" in str(it.value)
    assert not list(path.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert_same_outcome(whole, train(recipe, path, resume=True))


@pytest.mark.slow
def test_a_limit_on_files_is_told_in_one_message_by_the_command(stopped_run, contents):
    _, path = stopped_run(after=2, model_options={"width": 64, "depth": 1})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    script = Path(sysconfig.get_path("scripts")) / "at-smooth"
    before = contents(path / "checkpoints")
    # Python would leave truncated byte code behind, which fails every later import.
    environment = {**os.environ, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [script, "train", "--out", path, "--resume"],
        preexec_fn=limit, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert f"cannot write {path / 'checkpoints' / 'last.pt'} (File too large)" in message
    assert f"The last good checkpoint stands: {path / 'checkpoints' / 'last.pt'}, epoch 2." in message
    assert f"continue with: at-smooth train --out {path} --resume" in message
    assert contents(path / "checkpoints") == before
    assert [row["epoch"] for row in Run(path).history] == [1, 2]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_old_file_stands_where_the_disk_fails(tmp_path, monkeypatch, call):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"state": 1})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=r"cannot write .*c\.pt \(Input/output error\)"):
        checkpoint.save(path, {"state": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_that_is_gone_is_told_likewise(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*c\.pt"):
        checkpoint.save(tmp_path / "gone" / "c.pt", {"state": 2})
