"""What a run was trained with is what it says in the end, whatever becomes of its ``recipe.yaml``."""

import shutil

import pytest
import yaml
from click.testing import CliRunner

from at_smooth import CheckpointError, Run, RunError, checkpoint, load_data, train
from at_smooth.analysis import settings_of
from at_smooth.average import average_snapshots
from at_smooth.cli import cli
from at_smooth.grouping import by_setting
from at_smooth.reproduce import Planned

EDITS = {
    "eps": (0.2, "eps was 0.1, is now 0.2"),
    "batch_size": (16, "batch_size was 32, is now 16"),
    "eval_steps": (7, "eval_steps was 2, is now 7"),
    "attack_options": ({"steps": 5}, "attack_options.steps was 2, is now 5"),
    "method_options": ({"beta": 6}, "method_options.beta was not there, is now 6"),
    "smoother": ("swa", "smoother was none, is now swa"),
    "model": ("convnet", "model was mlp, is now convnet"),
    "dataset": ("npz", "dataset was digits, is now npz"),
}


def edit(path, **changes):
    file = path / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    for field, value in changes.items():
        content[field] = {**content[field], **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_recipe_is_refused_by_name_before_resuming(tiny, stopped_run, contents, field):
    recipe, path = stopped_run(eps=0.1)
    value, words = EDITS[field]
    edit(path, **{field: value})
    before = contents(path)
    result = CliRunner().invoke(cli, ["train", "--out", str(path), "--resume", "--override"])
    assert result.exit_code == 2
    assert words in result.stderr
    with pytest.raises(RunError, match=words):
        train(recipe, path, resume=True, override=True)
    assert contents(path) == before


def test_a_run_that_saved_nothing_yet_is_what_its_recipe_says(tiny, stopped_run, assert_same_outcome, tmp_path):
    _, path = stopped_run(after=0, midway=True)
    assert not Run(path).checkpoint("last").exists()
    edit(path, batch_size=16)
    run = train(tiny(batch_size=16), path, resume=True)
    assert_same_outcome(run, train(tiny(batch_size=16), tmp_path / "whole"))


def test_another_state_is_refused_too(tiny, stopped_run, tmp_path):
    recipe, path = stopped_run(after=2)
    train(tiny(seed=1), tmp_path / "other")
    assert Run(path).recipe == recipe
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.pt", path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"last\.pt is not of the run .*seed was 0, is now 1"):
        train(recipe, path, resume=True)


READERS = {
    "recipe": lambda run, recipe: run.recipe,
    "load_data": lambda run, recipe: load_data(run.path),
    "analyses": lambda run, recipe: settings_of([run]),
    "compare": lambda run, recipe: by_setting([run]),
    "reproduce": lambda run, recipe: Planned(None, recipe, run.path).run,
    "average": lambda run, recipe: average_snapshots(run.path, first=1),
    "resume": lambda run, recipe: train(recipe, run.path, resume=True),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_nobody_believes_it(tiny, plain_run, stopped_run, tmp_path, reader, finished):
    if finished:
        recipe, path = plain_run.recipe, tmp_path / "run"
        shutil.copytree(plain_run.path, path)
    else:
        recipe, path = stopped_run()
    edit(path, eps=0.3, dataset_options={"pool": 60})
    if reader == "reproduce" and not finished:
        assert READERS[reader](Run(path), recipe) is None
        return
    with pytest.raises(RunError, match=r"not what the run was trained with: .*pool was 100, is now 60.*eps was"):
        READERS[reader](Run(path), recipe)


@pytest.mark.parametrize("command", ["report", "overfitting", "watch"])
def test_no_command_believes_it(plain_run, tmp_path, command):
    shutil.copytree(plain_run.path, tmp_path / "run")
    edit(tmp_path / "run", eps=0.3)
    result = CliRunner().invoke(cli, [command, str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert "not what the run was trained with: eps was" in result.stderr


def test_what_changes_nothing_may_be_edited(tiny, stopped_run, tmp_path):
    recipe, path = stopped_run()
    edit(path, device="auto", threads=1, data_dir=str(tmp_path))
    assert Run(path).recipe == recipe.replacing(device="auto", threads=1, data_dir=tmp_path)


def test_a_line_that_is_missing_is_as_it_was(stopped_run):
    recipe, path = stopped_run(dataset_options={"pool": 60}, batch_size=16)
    file = path / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    del content["batch_size"], content["dataset_options"]["pool"]
    file.write_text(yaml.safe_dump(content))
    assert Run(path).recipe == recipe


@pytest.mark.parametrize("words", ["eps: 8/255", "eps: 0.03137254901960784"])
def test_a_number_may_be_written_in_another_way(stopped_run, words):
    recipe, path = stopped_run(eps="8/255")
    file = path / "recipe.yaml"
    lines = [words if line.startswith("eps:") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    assert Run(path).recipe == recipe


def test_a_snapshot_of_another_run_is_not_averaged(tiny, tmp_path):
    recipe = tiny(keep_checkpoints=1, epochs=2)
    one, other = train(recipe, tmp_path / "one"), train(recipe.replacing(seed=1), tmp_path / "other")
    shutil.copy(other.snapshot(2), one.snapshot(2))
    with pytest.raises(CheckpointError, match=r"epoch-0002\.pt is not of the run .*seed was 0, is now 1"):
        average_snapshots(one.path, first=1)


def test_the_best_weights_of_another_run_are_refused(tiny, stopped_run, tmp_path):
    recipe, path = stopped_run(after=3, lr=1e-9)  # nothing improves after the first epoch
    other = train(tiny(lr=1e-9, seed=1), tmp_path / "other")
    content = checkpoint.load(other.checkpoint("best"))
    assert content["row"]["epoch"] == 1
    shutil.copy(other.checkpoint("best"), path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"best\.pt is not of the run .*seed was 0, is now 1"):
        train(recipe, path, resume=True)


@pytest.mark.parametrize("where", ["run", "cache"])
def test_a_teacher_that_was_trained_otherwise_teaches_nobody(tiny, stopped_run, tmp_path, cache, watch, where):
    recipe, path = stopped_run(regularizer="kd-adv")
    stronger = train(tiny(method="at", attack_options={"steps": 3}), tmp_path / "stronger")
    (kept,) = (cache / "teachers").iterdir()
    own = path / "teachers" / "at" if where == "run" else kept
    shutil.copy(stronger.checkpoint("best"), own / "checkpoints" / "best.pt")
    progress = watch()
    if where == "run":
        with pytest.raises(
            CheckpointError, match=r"trained with another recipe .*attack_options.steps was 3, is now 2"
        ):
            train(recipe, path, resume=True, progress=progress)
    else:
        train(recipe, tmp_path / "another", progress=progress)
        assert "at teacher" in progress.roles
