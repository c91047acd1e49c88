"""Whatever a file holds, it is read in a moment, or refused by a message that names it."""

import json
import os
import shutil
import time

import pytest
import torch
import yaml
from click.testing import CliRunner

from at_smooth import FileError, InputError, OptionError, Run, checkpoint, load_model
from at_smooth.cli import cli
from at_smooth.commands.options import pairs_of
from at_smooth.following import history_so_far
from at_smooth.html_report import render
from at_smooth.reading import DEEPEST, json_of, parse_json, parse_yaml, text_of, yaml_of

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

YAML = {
    "nested lists": ("a: " + "[" * 10_000, "nested more than"),
    "nested mappings": ("{a: " * 10_000, "nested more than"),
    "nested blocks": ("- " * 10_000, "nested more than"),
    "nested keys": ("? " * 10_000, "nested more than"),
    "a long integer": ("a: " + "9" * 5_000, "5,000 characters"),
    "a long hexadecimal": ("a: 0x" + "f" * 5_000, "5,002 characters"),
    "a long sexagesimal": ("a: " + "1:" * 5_000 + "1", "10,001 characters"),
    "an empty integer": ("a: !!int ''", "line 1, column 4: '' is no value of the type int"),
    "an empty number": ("a: !!float ''", "'' is no value of the type float"),
    "no truth": ("a: !!bool x", "'x' is no value of the type bool"),
    "no moment": ("a: !!timestamp x", "'x' is no value of the type timestamp"),
    "an impossible date": ("a: 2020-13-45", "'2020-13-45' is no value of the type timestamp"),
    "no bytes": ("a: !!binary x", "base64"),
    "billion laughs": (LAUGHS, "alias"),
    "a loop": ("a: &a [*a]", "alias"),
    "a key twice": ("eps: 0.1\nseed: 1\neps: 0.2", "line 3, column 1: 'eps' comes twice"),
    "an unhashable key": ("? {a: 1}\n: 2", "unhashable key"),
    "a set of a list": ("!!set [a]", "mapping"),
    "an object": ("a: !!python/object/apply:os.mkdir [owned]", "could not determine a constructor"),
    "a NUL": ("a: \0", "not allowed"),
    "too much": ("a: " + "x" * 300_000, "262,144"),
}


@pytest.fixture(autouse=True)
def in_a_moment(tmp_path, monkeypatch):
    """Fails what takes long, and what makes files."""
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("text", "words"), YAML.values(), ids=YAML)
def test_yaml_is_refused_by_file_place_and_reason(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(FileError, match=words) as caught:
        yaml_of(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_yaml_as_people_write_it_is_read():
    assert parse_yaml("a: [1, {b: 0x1F}]\nc: 1_000\nd: 1e-3\n") == {"a": [1, {"b": 31}], "c": 1000, "d": "1e-3"}
    assert parse_yaml("<<: {a: 1, b: 2}\na: 3\n") == {"a": 3, "b": 2}
    assert parse_yaml("[" * DEEPEST + "]" * DEEPEST)
    assert parse_yaml("") is None


def test_an_option_is_text_where_it_is_no_yaml_and_refused_beyond_the_limits():
    assert pairs_of(("a=2020-13-45", "b=!!int ''", "c=*.py", "d=[1, 2]")) == {
        "a": "2020-13-45",
        "b": "!!int ''",
        "c": "*.py",
        "d": [1, 2],
    }
    for value in ("[" * 10_000, "9" * 5_000, "&a [*a]"):
        with pytest.raises(OptionError, match="key: the value cannot be read"):
            pairs_of((f"key={value}",))


@pytest.mark.parametrize("option", ["-R", "--set"])
def test_the_command_refuses_such_options(option):
    done = CliRunner().invoke(cli, ["train", "--dry-run", option, "a=" + "[" * 10_000])
    assert done.exit_code == 2
    assert "nested more than" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 100_000, "nested"), ("[" * 50 + "]" * 50, "nested"), ("9" * 5_000, "digits"), ("{", "no JSON"), ("", "no")],
)
def test_json_is_refused_by_file_and_reason(tmp_path, text, words):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(FileError, match=rf"summary\.json .*{words}"):
        json_of(tmp_path / "summary.json")


def test_json_as_it_is_written_is_read():
    assert parse_json('{"a": [1, null, 2.5, NaN], "b": {}}')["a"][:3] == [1, None, 2.5]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 100)
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, words in {
        "none": "No such file",
        "large": "more than 99 bytes",
        "bytes": "UTF-8",
        ".": "directory",
    }.items():
        with pytest.raises(FileError, match=words):
            text_of(tmp_path / name, most=99)
    with pytest.raises(FileError, match="null byte"):
        text_of(tmp_path / "a\0b")


@pytest.fixture
def copied(plain_run, tmp_path):
    """A run whose files may be spoilt."""
    shutil.copytree(plain_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


ROW = "1,0.1,2.0,10.0,11.0,12.0,,,,,,,1.5"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("x" * 200_000, "field larger than field limit"),
        (ROW.replace("1,0.1", "2,0.1", 1), "line 2: it is of epoch '2', not 1"),
        (ROW.replace("1,0.1", "9" * 5_000 + ",0.1", 1), "line 2: it is of epoch '9999"),
        (ROW.replace("12.0", "120"), "val_ra is 120"),
        (ROW.replace("12.0", "inf"), "val_ra is inf"),
        (ROW.replace("12.0", "much"), "could not convert"),
        (ROW[:20], "not as many cells"),
        (ROW + ",1", "not as many cells"),
    ],
)
def test_metrics_are_refused_by_line(copied, row, words):
    path = copied.path / "metrics.csv"
    path.write_text(path.read_text().splitlines()[0] + f"\n{row}\n")
    for read in (lambda: copied.history, lambda: history_so_far(copied)):
        with pytest.raises(FileError, match=rf"metrics\.csv cannot be read .*{words}"):
            read()


def test_metrics_without_a_column_are_refused(copied):
    (copied.path / "metrics.csv").write_text("epoch,lr\n1,0.1\n")
    with pytest.raises(FileError, match="lacks the column 'train_loss'"):
        copied.history  # noqa: B018


SUMMARIES = [
    ("raw.best.test_ra", "much"), ("raw.best.test_ra", 101), ("raw.final.epoch", 0), ("raw.diff", []),
    ("smoothed", {}), ("reported", "smoothed"), ("reported", ["raw"]), ("examples", {"test": -1}),
    ("examples", {"test": "all"}), ("recipe", {}), ("recipe.method", 3), ("recipe.seed", [1]),
    ("recipe.model_options", []), ("recipe.eps", "wide"), ("recipe.epochs", 10**30),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), SUMMARIES)
def test_a_summary_of_other_types_is_refused(copied, place, value):
    path = copied.path / "summary.json"
    content = json.loads(path.read_text())
    *above, name = place.split(".")
    parent = content
    for key in above:
        parent = parent[key]
    parent[name] = value
    path.write_text(json.dumps(content))
    done = CliRunner().invoke(cli, ["compare", str(copied.path)])
    assert done.exit_code == 2, done.exception
    assert f"{path} does not hold what it should: {place.partition('.')[0]}" in done.stderr or "reports" in done.stderr


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "3", "[" * 10_000, '{"versions": 3}', '{"command": [1, {}]}', '{"resumed": 5}', '{"packages": []}'],
)
def test_an_environment_of_other_types_counts_as_none(copied, content):
    (copied.path / "environment.json").write_text(content)
    assert copied.environment == {}
    assert render([copied])


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", [1]), ("epochs", "many"), ("seed", {"a": 1}), ("milestones", [[1]]), ("eps", "wide"),
     ("lr_schedule", "steep"), ("method", 3), ("attack_options", []), ("norm", "L7")],
)  # fmt: skip
def test_a_recorded_recipe_of_other_types_is_refused(copied, field, value):
    path = copied.path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), field: value}))
    for arguments in (("report",), ("overfitting",), ("watch", "--once")):
        done = CliRunner().invoke(cli, [*arguments, str(copied.path)])
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        assert field in done.stderr
    assert not (copied.path / "report.html").exists()


@pytest.mark.parametrize(
    "change",
    [{"n": "five"}, {"n": 0}, {"threat": []}, {"threat": {"norm": "L7", "eps": 1}}, {"results": {"pgd": 5}},
     {"results": {"pgd": {"accuracy": "much", "ci95": [1, 2]}}}, {"results": {"pgd": {"accuracy": 5, "ci95": [1]}}},
     {"checkpoint": 3}, {"weights": ["raw"]}],
)  # fmt: skip
def test_an_evaluation_of_other_types_is_left_out_of_the_report_with_a_note(copied, change):
    content = {
        "n": 5, "threat": {"norm": "Linf", "eps": 0.1}, "checkpoint": "final.pt", "weights": "raw", "part": "test",
        "dataset": "digits", "results": {"pgd": {"accuracy": 12.5, "ci95": [10, 20], "seconds": 1.0}},
    }  # fmt: skip
    (copied.path / "evaluations").mkdir()
    (copied.path / "evaluations" / "evaluation-1.json").write_text(json.dumps(content))
    (copied.path / "evaluations" / "evaluation-2.json").write_text(json.dumps({**content, **change}))
    page = render([copied])
    assert "12.50" in page
    assert "left out: " in page
    assert "evaluation-2.json" in page


def test_a_preset_that_is_based_on_itself_is_refused(distribution, tmp_path):
    distribution("circular", {"recipes": {"circular": "circular_recipes"}})
    folder = tmp_path / "site-circular" / "circular_recipes"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "one.yaml").write_text("based_on: two\n")
    (folder / "two.yaml").write_text("based_on: one\n")
    (tmp_path / "own.yaml").write_text("based_on: [one]\n")
    done = CliRunner().invoke(cli, ["train", "--recipe", "one", "--dry-run"])
    assert "based on itself: one on two on one" in done.stderr
    done = CliRunner().invoke(cli, ["train", "--recipe", "own.yaml", "--dry-run"])
    assert "no recipe file or preset '['one']'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("train", "--out", "a\0b"), ("train", "--data-dir", "a\0b", "--dataset", "npz", "--dry-run"), ("report", "a\0b"),
     ("evaluate", "run", "--json", "a\0b"), ("evaluate", "a\0b"), ("export", "a\0b"), ("compare", "a\0b"),
     ("average", "a\0b", "--from", "1"), ("overfitting", "a\0b"), ("reproduce", "table-1", "--out", "a\0b"),
     ("analyze", "curves", "a\0b"), ("analyze", "curves", "run", "--out", "a\0b"), ("watch", "a\0b"),
     ("train", "--recipe", "a\0b", "--dry-run"), ("train", "--recipe", "a\0b.yaml", "--dry-run"), ("transfer", "a\0b")],
)  # fmt: skip
def test_a_nul_in_a_path_is_refused(copied, arguments):
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2, done.exception
    assert isinstance(done.exception, SystemExit)


def test_python_refuses_such_paths_too(copied, tiny):
    from at_smooth import Recipe, train
    from at_smooth.analysis import analyze
    from at_smooth.export import export
    from at_smooth.html_report import write_report

    for function in (
        lambda path: Run(path), lambda path: load_model(path), lambda path: train(tiny(), path),
        lambda path: Recipe(dataset="npz", data_dir=path), lambda path: write_report([copied], path),
        lambda path: export(copied.path, path), lambda path: analyze("curves", [copied], path),
    ):  # fmt: skip
        with pytest.raises(InputError):
            function("a\0b")


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
def test_a_run_whose_name_is_no_utf8_is_reported(copied):
    path = copied.path.with_name(os.fsdecode(b"run-\xff"))
    copied.path.rename(path)
    from at_smooth.html_report import write_report

    page = write_report([path]).read_text(encoding="utf-8")
    assert "run-\\udcff" in page


@pytest.mark.parametrize("kind", ["a figure out of bounds", "a tensor in the recipe"])
def test_a_state_of_other_values_is_refused_before_it_is_taken_up(stopped_run, contents, kind):
    _, path = stopped_run(after=2)
    last = path / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    if kind == "a figure out of bounds":
        content["state"]["best"]["raw"]["row"]["val_ra"] = 1e9
    else:
        content["recipe"]["threads"] = torch.zeros(3)
    checkpoint.save(last, content)
    before = contents(path)
    done = CliRunner().invoke(cli, ["train", "--out", str(path), "--resume"])
    assert done.exit_code == 2, done.exception
    assert str(last) in done.stderr
    assert contents(path) == before
