"""Mutated command lines for every command, and mutated files of a run read by every command that reads runs.

Each ends in exit code 0, in 2 with one message, or in a code that its command documents; never in a traceback, and
nothing that was there before is written over.
"""

import json
import os
import random
import shutil

import pytest
from click.testing import CliRunner

from at_smooth import train
from at_smooth.cli import cli

pytestmark = pytest.mark.slow

#: Values that people and shells produce, in place of any argument.
NASTY = [
    "", " ", "-1", "0", "1e999", "nan", "inf", "9" * 400, "é\udcff", "a\0b", "[/red]", "[bold]x", "\x1b[31m", "..", "/",
    "/dev/null", "missing", "missing/deeper/file", "~nobody/x", "a:b", "os:system", ":", "x=", "=x", "=", "a=b=c", "--",
    "-", "--help", "x" * 5000, "8", "8/255/2", "1/0", "none", "at,at", "*", "$(id)", "{}", "[[[[", "&a *a", "link",
    "folder", "file.txt",
]  # fmt: skip

#: Valid command lines to start from; RUN and OTHER are finished runs, KEPT kept snapshots.
VALID = [
    "train --dry-run --device cpu -D pool=40 --epochs 2 --smoother swa --regularizer tf-kd -R alpha=0.2 --eps 0.1",
    "train --dry-run --device cpu -D pool=40 --norm L2 --eps 0.5 -A steps=2 --method trades -M beta=3 --seed 1",
    "train --dry-run --device cpu --recipe RUN/recipe.yaml --lr 0.1 --batch-size 20",
    "train --out RUN --resume --device cpu",
    "evaluate RUN --with clean --with fgsm --device cpu --n-examples 20 --json out.json --seed 1",
    "evaluate RUN/checkpoints/best.pt --with pgd -E pgd.steps=1 --device cpu --n-examples 10 --batch-size 5 --eps 0.05",
    "transfer RUN OTHER --device cpu --n-examples 10 -A steps=1 --json out.json",
    "compare RUN OTHER --format markdown",
    "overfitting RUN OTHER --format csv",
    "report RUN OTHER --out out.html --figures none",
    "analyze curves RUN OTHER --out figures",
    "average KEPT --from 1 --every 1 --to 4 --out out.pt",
    "export RUN --format robustbench --out exported --name x",
    "watch RUN --once",
    "plugins regularizers tf-kd",
    "plugins models",
    "reproduce",
]


def mutated(arguments, draw):
    """Some arguments dropped, doubled, swapped or replaced."""
    arguments = list(arguments)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        spot = draw.randrange(len(arguments))
        kind = draw.choice(["drop", "double", "swap", "replace", "replace", "replace", "cut", "insert"])
        if kind == "drop" and len(arguments) > 1:
            del arguments[spot]
        elif kind == "double":
            arguments.insert(spot, arguments[spot])
        elif kind == "swap":
            other = draw.randrange(len(arguments))
            arguments[spot], arguments[other] = arguments[other], arguments[spot]
        elif kind == "cut":
            arguments[spot] = arguments[spot][: draw.randrange(len(arguments[spot]) + 1)]
        elif kind == "insert":
            arguments.insert(spot, draw.choice(NASTY))
        elif spot:
            arguments[spot] = draw.choice(NASTY)
    return arguments


def carried_out(arguments, codes=(0, 2)):
    """Run the command in this process; its exit code, where that is one of the documented ones."""
    result = CliRunner().invoke(cli, arguments)
    if not isinstance(result.exception, SystemExit | None):
        raise AssertionError(f"{arguments}: {result.exception!r}") from result.exception
    assert "Traceback" not in result.output, arguments
    assert result.exit_code in codes, (arguments, result.output)
    if result.exit_code == 2:
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, (arguments, result.output)
    return result.exit_code


def snapshot(folder):
    """Every regular file below a folder with its bytes; what lies behind links is listed by the link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = path.read_bytes()
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch, plain_run, smoothed_run):
    """A folder with two runs, a file of the user's, a link to it and a folder; all have to stay as they are."""
    monkeypatch.chdir(tmp_path)
    others = shutil.ignore_patterns("evaluations")  # of other tests
    shutil.copytree(plain_run.path, tmp_path / "RUN", ignore=others)
    shutil.copytree(smoothed_run.path, tmp_path / "OTHER", ignore=others)
    (tmp_path / "file.txt").write_text("mine\n")
    (tmp_path / "link").symlink_to("file.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("mine\n")
    return tmp_path


@pytest.mark.parametrize("line", VALID, ids=lambda line: line.partition(" --")[0].replace(" ", "-"))
def test_ninety_mutated_command_lines_are_refused_or_carried_out(line, workplace, tiny, tmp_path):
    if "KEPT" in line:
        train(tiny(keep_checkpoints=1), workplace / "KEPT")
    draw = random.Random(line)
    before = snapshot(workplace)
    for _ in range(90):
        arguments = mutated(line.split(), draw)
        if "train" in arguments[:1] and not {"--dry-run", "--resume"} & set(arguments):
            arguments.append("--dry-run")  # a mutation that only makes another training of it
        carried_out(arguments)
        now = snapshot(workplace)
        assert {path: now.get(path) for path in before} == before, arguments
        for path in set(now) - set(before):  # what it made, so that the next one finds the same folder
            path.unlink()


def broken_bytes(content, draw):
    """A few bytes of a file changed, or the file cut."""
    broken = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        if broken:
            spot = draw.randrange(len(broken))
            broken[spot : spot + draw.randint(0, 3)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
    return bytes(broken[: draw.randrange(len(broken) + 1)] if draw.random() < 0.2 else broken)


def broken_json(content, draw):
    """A value somewhere in a JSON file exchanged or removed."""
    content = json.loads(content)
    parent = content
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = draw.choice(keys)
        if isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.7:
            parent = parent[key]
            continue
        break
    if draw.random() < 0.3:
        del parent[key]
    else:
        parent[key] = draw.choice(
            [None, "text", "[/red]", -7, 1e308, float("nan"), [], {}, {"a": 1}, [[[]]], True, 10**400, "\ud800", "\0"]
        )
    text = json.dumps(content)
    return ("[" * 5000 + text if draw.random() < 0.03 else text).encode("utf-8", "surrogatepass")


READERS = [
    ("report", "RUN", "--out", "out.html", "--figures", "none"),
    ("compare", "RUN", "OTHER"),
    ("overfitting", "RUN", "OTHER"),
    ("watch", "RUN", "--once"),
    ("evaluate", "RUN", "--with", "clean", "--device", "cpu"),
    ("train", "--out", "RUN", "--resume"),
    ("train", "--recipe", "RUN/recipe.yaml", "--dry-run", "--device", "cpu"),
    ("analyze", "curves", "RUN", "--out", "figures"),
    ("export", "RUN", "--out", "exported"),
]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "environment.json", "metrics.csv", "summary.json", "evaluation", "final.pt"]
)
def test_seventy_mutations_of_a_runs_file_are_refused_or_harmless(name, workplace):
    run = workplace / "RUN"
    carried_out(["evaluate", str(run), "--with", "clean", "--device", "cpu"])
    [report] = (run / "evaluations").iterdir()
    file = {"evaluation": report, "final.pt": run / "checkpoints" / "final.pt"}.get(name, run / name)
    good, draw = file.read_bytes(), random.Random(name)
    pristine = snapshot(workplace)
    for number in range(70):
        by_value = file.suffix == ".json" and number % 2
        file.write_bytes(broken_json(good, draw) if by_value else broken_bytes(good, draw))
        before = snapshot(workplace)
        arguments = READERS[number % len(READERS)]
        carried_out(list(arguments))
        now = snapshot(workplace)
        if "--resume" in arguments:  # a run whose summary is gone goes on to its end, which writes its files
            for path, content in pristine.items():
                if path.is_relative_to(run):
                    path.write_bytes(content)
        else:
            assert {path: now.get(path) for path in before} == before, arguments
        for path in set(snapshot(workplace)) - set(pristine):
            path.unlink()
        file.write_bytes(good)
