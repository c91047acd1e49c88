"""Whatever cannot be written, the last good checkpoint stands and the message says so."""

import os
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest

from at_smooth import OptionError, Run, StorageError, checkpoint, train
from at_smooth.export import export

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


@contextmanager
def files_up_to(size):
    """No file may have more bytes than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["robustbench", "torchscript", "onnx"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_an_export_that_cannot_be_written_leaves_nothing(plain_run, tmp_path, form, there):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with files_up_to(2000), pytest.raises(StorageError, match=r"cannot write .*out \(File too large\)"):
        export(plain_run.path, out, form)
    assert os.listdir(tmp_path) == ["out"] * there
    assert not there or not os.listdir(out)


def test_an_export_on_a_full_disk_leaves_nothing(plain_run, small_disk):
    (small_disk / "other").write_bytes(bytes(250_000))
    for form in ("robustbench", "torchscript"):
        with pytest.raises(StorageError, match="No space left on device"):
            export(plain_run.path, small_disk / "out", form)
    assert os.listdir(small_disk) == ["other"]


REFUSING = """
from at_smooth import OptionError, Regularizer

ASKED = []

class Refusing(Regularizer):
    def setup(self, teachers):
        ASKED.append(1)
        if len(ASKED) > 1:  # the first time is before the run begins
            raise OptionError("refused at last")
"""


@pytest.mark.parametrize("kind", ["new", "there", "working directory", "link"])
def test_a_run_that_is_refused_late_says_why_and_leaves_what_was_there(tiny, tmp_path, distribution, monkeypatch, kind):
    distribution("refusing", {"regularizers": {"refusing": "refusing_plugin:Refusing"}}, {"refusing_plugin": REFUSING})
    folder = tmp_path / "folder"
    if kind != "new":
        folder.mkdir()
        monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to("folder")
    out = {"working directory": ".", "link": tmp_path / "link"}.get(kind, folder)
    with pytest.raises(OptionError, match="refused at last"):
        train(tiny(regularizer="refusing"), out)
    assert (tmp_path / "link").is_symlink()
    assert folder.exists() == (kind != "new")
    assert not folder.exists() or not os.listdir(folder)
