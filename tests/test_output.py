"""Standard output and error: any text, and nothing that ends the work."""

import io
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from at_smooth.cli import cli
from at_smooth.output import echo, lasting_output, nobody_reads, output_failure, printable

TINY = [
    *("-D", "pool=100", "-N", "width=8", "-N", "depth=1", "-A", "steps=2", "--epochs", "2"),
    *("--set", "eval_steps=2", "--batch-size", "32", "--device", "cpu", "--test-every", "1"),
]


@pytest.fixture
def streams(monkeypatch):
    """Puts real files in the place of standard output and error, of some encoding; gives what was written to each."""
    opened = []

    def use(out, encoding="utf-8", errors="strict"):
        for name in ("stdout", "stderr"):
            file = open(out, "wb", buffering=io.DEFAULT_BUFFER_SIZE, closefd=False)  # noqa: SIM115
            opened.append(io.TextIOWrapper(file, encoding, errors))
            monkeypatch.setattr(sys, name, opened[-1])

    yield use
    for stream in opened:
        stream.close()


@pytest.fixture
def pipe():
    """Both ends of a pipe, as numbers; closed at the end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("utf-8", "strict", "1\N{EN DASH}2 ± 3 \N{SNOWMAN} ?"),
        ("cp1252", "strict", "1\N{EN DASH}2 ± 3 ? ?"),
        ("latin-1", "strict", "1-2 ± 3 ? ?"),
        ("ascii", "strict", "1-2 +- 3 ? ?"),
        ("ascii", "surrogateescape", "1-2 +- 3 ? ?"),
        ("ascii", "backslashreplace", "1\\u20132 \\xb1 3 \\u2603 \\udcff"),  # somebody's own wish
    ],
)
def test_what_an_encoding_lacks_is_replaced(streams, pipe, encoding, errors, expected):
    streams(pipe[1], encoding, errors)
    with lasting_output():
        print("1\N{EN DASH}2 ± 3 \N{SNOWMAN} \udcff", flush=True)
    assert os.read(pipe[0], 100).decode(encoding) == expected + "\n"


def test_a_pipe_that_nobody_reads_takes_everything(streams, pipe):
    streams(pipe[1])
    before = sys.stdout
    os.close(pipe[0])
    with lasting_output():
        assert not nobody_reads()
        for _ in range(3):
            print("x" * 100_000)
            echo("y", err=True)
        assert nobody_reads()
        assert output_failure() == ""
        os.write(sys.stdout.fileno(), b"of a library in C")
    assert sys.stdout is before
    sys.stdout.flush()  # as Python does at its end
    sys.stderr.flush()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_not_taken_for_a_reader_that_is_gone(streams):
    with Path("/dev/full").open("wb", buffering=0) as full:
        streams(full.fileno())
        with lasting_output():
            print("x")
            assert "space" in output_failure()
            print("x", flush=True)


def test_streams_without_bytes_and_without_anything_are_left_alone(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        print("x")
        assert (output_failure(), nobody_reads()) == ("", False)
    assert text.getvalue() == "x\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("over\rwritten\x08\x07", "over␍written␈␇"),
        ("\x9b31m \x7f \x00", "\ufffd31m ␡ ␀"),
        ("run\u202etxt.exe", "run\ufffdtxt.exe"),
        ("Zürich 苏州 ± 🙂", "Zürich 苏州 ± 🙂"),
    ],
)
def test_what_controls_a_terminal_is_shown_as_a_picture(text, shown):
    assert printable(text) == shown


# Commands, in this process


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("COLUMNS", "160")
    return path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_table_is_printed_in_any_encoding(plain_run, smoothed_run, folder, encoding):
    runs = [shutil.copytree(plain_run.path, "run"), str(smoothed_run.path)]
    styles = [["--format", style] for style in ("text", "markdown", "latex", "csv")]
    commands = [
        *(["compare", *runs, *style] for style in styles),
        *(["overfitting", *runs, *style] for style in styles),
        *(["watch", runs[0]], ["watch", runs[0], "--once"], ["plugins", "regularizers", "kd-std-adv"]),
        *(["reproduce"], ["analyze"], ["plugins"], ["average", runs[0], "--from", "1"]),
        ["evaluate", runs[0], "--with", "\N{SNOWMAN}=clean", "--n-examples", "20"],
    ]
    for command in commands:
        result = CliRunner(charset=encoding).invoke(cli, command)
        assert isinstance(result.exception, SystemExit | None), (command, result.exception)
        assert result.exit_code == (2 if command[0] == "average" else 0), (
            result.output
        )  # no run of ours keeps snapshots


def test_messages_show_control_characters(folder):
    for command in (["evaluate", "no\x1b[31mrun"], ["train", "--no\x1b[31mthing"], ["compare", "r", "--format=\x1b"]):
        result = CliRunner().invoke(cli, command, color=True)
        assert result.exit_code == 2
        assert "␛" in result.stderr or r"\x1b" in result.stderr
        assert "\x1b" not in result.output


# Commands, in processes of their own


@pytest.fixture
def unread(pipe):
    """Runs the command with a standard output that nobody reads, and an encoding that lacks much; gives its end."""
    os.close(pipe[0])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}

    def run(*arguments, err=subprocess.PIPE, module=("-m", "at_smooth")):
        command = [sys.executable, *module, *map(str, arguments)]
        done = subprocess.run(command, env=environment, stdout=pipe[1], stderr=err, text=True, timeout=300)
        return done.returncode, done.stderr

    return run


@pytest.mark.slow
def test_a_training_ends_as_it_would_have(unread, folder):
    assert unread("train", *TINY, "--out", "run") == (0, "")
    assert (folder / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_listings_end_quietly_and_so_does_watching_what_goes_on(unread, folder, plain_run):
    going = Path(shutil.copytree(plain_run.path, folder / "going"))
    (going / "summary.json").unlink()
    for command in (["compare", plain_run.path], ["plugins"], ["watch", going, "--every", "0.1"]):
        assert unread(*command) == (0, "")


@pytest.mark.slow
def test_messages_that_nobody_reads_change_no_exit_code(unread):
    commands = {("compare", "nothing"): 2, ("train", "--nothing"): 2, ("--help",): 0, ("train", "--dry-run"): 0}
    assert {command: unread(*command, err=subprocess.STDOUT)[0] for command in commands} == commands


@pytest.mark.slow
def test_ranks_go_on_without_a_reader(unread, folder):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "at_smooth"]
    code, error = unread("train", *TINY, "--out", "run", module=launcher)
    assert code == 0, error
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
    assert (folder / "run" / "summary.json").is_file()
