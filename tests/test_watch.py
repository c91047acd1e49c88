import io
import json
import os
import re
import signal
import struct
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from at_smooth import Run
from at_smooth.cli import cli
from at_smooth.following import Progress, history_so_far, teachers_of
from at_smooth.text_plot import Curve, plot
from at_smooth.watch import follow, frame, once

SMALL = ["-D", "pool=100", "--model", "mlp", "-N", "width=8", "-N", "depth=1", "-A", "steps=2", "--batch-size", "32",
         "--set", "eval_steps=2", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def console():
    """Makes a console that writes into memory."""

    def make(width=80, height=24, encoding="utf-8", **options):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return Console(file=file, width=width, height=height, **options)

    return make


@pytest.fixture
def unfinished(stopped_run):
    """A run of which two epochs are done."""
    _, path = stopped_run(smoother="ema")
    return Run(path)


def finish(run, finished):
    """Let a run look finished, with the figures of another."""
    summary = {**finished.summary, "recipe": run.recorded}
    (run.path / "summary.json").write_text(json.dumps(summary))


def written(console):
    console.file.flush()
    return console.file.buffer.getvalue().decode()


def body(text):
    return [line[6:] for line in text.plain.splitlines()[:-2]]


def test_a_line_goes_from_corner_to_corner():
    text = plot([Curve("r", "red", [(1, 0.0), (11, 10.0)])], width=17, height=13, x=(1, 11), braille=False)
    assert body(text) == [" " * (10 - n) + "r" + " " * n for n in range(11)]
    assert text.plain.splitlines()[0].startswith("  10 |")
    assert text.plain.splitlines()[10].startswith("   0 |")
    assert text.plain.splitlines()[-1].split() == ["1", "epoch", "11"]


def test_braille_is_the_same_with_eight_dots_a_character():
    text = plot([Curve("r", "red", [(0, 0.0), (7, 10.0)])], width=10, height=4, x=(0, 7))
    assert [line.replace("\N{BRAILLE PATTERN BLANK}", " ") for line in body(text)] == ["  ⡠⠊", "⡠⠊  "]


def test_the_later_curve_lies_in_front_and_marks_behind():
    flat = [Curve("s", "cyan", [(1, 50.0), (10, 50.0)]), Curve("r", "blue", [(5, 50.0), (10, 50.0)])]
    text = plot(flat, width=16, height=5, x=(1, 10), marks=[3, 99], braille=False)
    assert "ssssrrrrrr" in text.plain
    assert sum(line[2] == ":" for line in body(text)) == 2


def test_a_single_point_is_a_dot():
    assert plot([Curve("r", "red", [(1, 55.0)])], 20, 8, (1, 10), braille=False).plain.count("r") == 1


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 16)])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_frame_fits_the_terminal(smoothed_run, console, width, height, encoding):
    screen = console(width, height, encoding, force_terminal=True, color_system="standard")
    once(smoothed_run, screen)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", written(screen)).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("\N{BRAILLE PATTERN BLANK}" < sign <= "\u28ff" for line in lines for sign in line) == (
        encoding == "utf-8"
    )


def test_a_frame_says_how_far_it_is(unfinished, console):
    text = frame(unfinished, console()).plain
    assert "epoch 2/4" in text
    assert "lr 0.01" in text
    assert "left" in text
    best = max(unfinished.history, key=lambda row: row["val_ra"])
    assert f"best  raw       val RA {best['val_ra']:.1f}" in text
    assert "best  smoothed" in text
    assert "R RA smoothed" in text
    assert "not being trained" in text
    assert f"--out {unfinished.path} --resume" in text


def test_silence_is_mentioned_while_somebody_seems_to_train(unfinished, console):
    (unfinished.path / ".lock").write_text("1 here")
    assert "no epoch for" not in frame(unfinished, console()).plain
    for file in ("metrics.csv", "recipe.yaml"):
        os.utime(unfinished.path / file, (time.time() - 7200,) * 2)
    assert "no epoch for 2.0 h" in frame(unfinished, console()).plain


def test_a_torn_last_line_is_none_yet(unfinished, console):
    whole = history_so_far(unfinished)
    assert whole == unfinished.history
    with (unfinished.path / "metrics.csv").open("a") as file:
        file.write("3,0.1,2.5")
    assert history_so_far(unfinished) == whole
    assert "epoch 2/4" in frame(unfinished, console()).plain


def test_how_far_a_run_is(plain_run, unfinished, tiny, tmp_path):
    assert str(Progress.of(plain_run)) == "finished"
    assert str(Progress.of(unfinished)) == "epoch 2 of 4"
    begun = Progress.of(Run.create(tmp_path / "begun", tiny()))
    assert (begun.epoch, begun.left) == (0, None)
    assert Progress(10, 40, False, 20.0).left == 60.0


def test_a_teacher_that_is_trained_is_what_goes_on(stopped_run, console):
    _, path = stopped_run(stop="at teacher", regularizer="kd-adv")
    run = Run(path)
    [teacher] = teachers_of(run)
    text = frame(run, console()).plain
    assert text.startswith(f"teacher {teacher.path.name}")
    assert "epoch 2/4" in text


def test_nothing_measured_yet_is_said_calmly(tiny, tmp_path):
    run = Run.create(tmp_path / "run", tiny())
    result = CliRunner().invoke(cli, ["watch", str(run.path), "--once"])
    assert result.exit_code == 0
    assert "no epoch is done yet, of 4" in result.stdout


def test_no_run_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["watch", str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert "is no run directory" in result.stderr


@pytest.mark.parametrize("more", [[], ["--once"]])
def test_a_finished_run_is_shown_and_that_is_all(plain_run, more):
    result = CliRunner().invoke(cli, ["watch", str(plain_run.path), *more])
    assert result.exit_code == 0
    assert ("finished, 4 epochs" in result.stdout) == bool(more)
    assert ("epoch 4/4" in result.stdout) == (not more)


def test_watching_goes_on_until_the_end(unfinished, plain_run, console):
    screen = console(force_terminal=True)
    looks = []

    def pause(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            finish(unfinished, plain_run)

    follow(unfinished, screen, every=5.0, pause=pause)
    assert looks == [5.0] * 3
    assert "finished, 2 epochs" in written(screen)


def test_elsewhere_each_epoch_is_a_line(unfinished, plain_run, console):
    pages = console()

    def pause(_):
        with (unfinished.path / "metrics.csv").open("a") as file:
            file.write(f"3,0.1,2.5,50,60,{40},,,,,,,1.0\n")
        finish(unfinished, plain_run)

    follow(unfinished, pages, pause=pause)
    lines = written(pages).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/4", "epoch 2/4", "epoch 3/4"]
    assert lines[2] == "epoch 3/4  val RA 40.0 SA 60.0"


@pytest.fixture
def watching():
    """Starts ``at-smooth watch`` in a terminal of 80x24; gives the process and what reads all that it drew."""
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    script = Path(sysconfig.get_path("scripts")) / "at-smooth"

    def start(path):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        process = subprocess.Popen(
            [str(script), "watch", str(path), "--every", "0.1"],
            stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
            env={**environment, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        os.close(theirs)
        return process, ours

    return start


def read_until(terminal, words=None):
    """What a terminal shows until some words are there, or until its end."""
    shown = b""
    while words is None or words not in shown:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # nobody writes into it any more
            break
        if not read:
            break
        shown += read
    return shown.decode()


@pytest.mark.slow
def test_a_training_is_watched_while_it_goes_on(command, watching, tmp_path):
    training = command("train", "--out", tmp_path / "run", "--epochs", "15", *SMALL)
    while not (tmp_path / "run" / "recipe.yaml").is_file() and training.poll() is None:
        time.sleep(0.02)
    process, terminal = watching(tmp_path / "run")
    shown = read_until(terminal)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    assert training.wait(timeout=60) == 0
    assert "finished, 15 epochs" in shown
    assert (tmp_path / "run" / "summary.json").is_file()


def test_ctrl_c_ends_the_watching_without_noise(unfinished, watching):
    process, terminal = watching(unfinished.path)
    read_until(terminal, b"epoch 2/4")
    process.send_signal(signal.SIGINT)
    shown = read_until(terminal)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == b""
    assert "Traceback" not in shown
    assert "SIGINT" not in shown
