import json
import shutil
import statistics
from itertools import chain

import numpy as np
import pytest
import torch
import yaml

from at_smooth import (
    CheckpointError,
    DivergedError,
    FileError,
    InputError,
    Recipe,
    Run,
    RunError,
    load_data,
    load_model,
    train,
)
from at_smooth.run import environment

COLUMNS = (
    "epoch,lr,train_loss,train_acc,val_sa,val_ra,test_sa,test_ra,"
    "smoothed_val_sa,smoothed_val_ra,smoothed_test_sa,smoothed_test_ra,seconds"
)
PREFIX = {"raw": "", "smoothed": "smoothed_"}


def test_a_run_directory_is_as_agreed(smoothed_run):
    files = {path.name for path in smoothed_run.path.iterdir()}
    assert files >= {"recipe.yaml", "environment.json", "metrics.csv", "checkpoints", "summary.json", "curves.png"}
    checkpoints = {path.name for path in (smoothed_run.path / "checkpoints").iterdir()}
    assert checkpoints == {"last.pt", "best.pt", "best_smoothed.pt", "final.pt"}
    assert (smoothed_run.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_smoother_there_is_nothing_smoothed(plain_run):
    assert {path.stem for path in plain_run.path.glob("checkpoints/*")} == {"last", "best", "final"}
    assert plain_run.summary["smoothed"] is None
    assert plain_run.summary["reported"] == "raw"
    assert all(row["smoothed_val_ra"] is None for row in plain_run.history)


def test_no_part_files_are_left(smoothed_run):
    assert not list(smoothed_run.path.rglob("*.part"))


def test_metrics_have_a_row_an_epoch(smoothed_run):
    lines = (smoothed_run.path / "metrics.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    assert [line.split(",")[0] for line in lines[1:]] == [str(epoch) for epoch in range(1, 9)]
    for row in smoothed_run.history:
        percents = [value for name, value in row.items() if name.endswith(("_sa", "_ra", "_acc")) and value is not None]
        assert percents
        assert all(0 <= value <= 100 for value in percents)


def test_what_was_not_measured_is_blank(smoothed_run):
    history = smoothed_run.history
    assert [row["epoch"] for row in history if row["test_ra"] is None] == [1, 3]  # every other, and the last five
    assert [row["epoch"] for row in history if row["smoothed_val_ra"] is None] == [1, 2]  # before the first decay


def test_the_recipe_is_enough_to_run_it_again(smoothed_run, tmp_path, assert_same_outcome):
    recipe = Recipe.from_yaml(smoothed_run.path / "recipe.yaml")
    assert recipe == smoothed_run.recipe
    assert_same_outcome(train(recipe, tmp_path / "again"), smoothed_run)


def test_the_environment_says_versions_device_seed_and_command(smoothed_run, tiny):
    content = json.loads((smoothed_run.path / "environment.json").read_text())
    assert content.keys() == environment(tiny()).keys()
    assert content["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert content["seed"] == 0
    assert content["device"] == "cpu"
    assert content["command"]


def test_the_summary_has_the_agreed_keys(smoothed_run):
    summary = smoothed_run.summary
    assert set(summary) == {"raw", "smoothed", "reported", "recipe", "seconds", "examples", "test_set"}
    assert summary["examples"] == {"val": 10, "test": 700}
    for weights in PREFIX:
        block = summary[weights]
        assert set(block) == {"best", "final", "diff"}
        assert set(block["best"]) == {"epoch", "val_ra", "test_ra", "test_sa"}
        assert set(block["final"]) == {"epoch", "test_ra", "test_sa", "last5_ra_mean", "last5_ra_sd"}
        assert set(block["diff"]) == {"ra", "sa"}
    assert summary["recipe"] == yaml.safe_load((smoothed_run.path / "recipe.yaml").read_text())


@pytest.mark.parametrize("weights", PREFIX)
def test_the_summary_follows_from_the_metrics(smoothed_run, weights):
    history, block, prefix = smoothed_run.history, smoothed_run.summary[weights], PREFIX[weights]
    measured = [row for row in history if row[f"{prefix}val_ra"] is not None]
    best = max(measured, key=lambda row: row[f"{prefix}val_ra"])  # the first of equals
    assert block["best"]["epoch"] == best["epoch"]
    assert block["best"]["val_ra"] == best[f"{prefix}val_ra"]
    for name in ("ra", "sa"):
        if best[f"{prefix}test_{name}"] is not None:
            assert block["best"][f"test_{name}"] == best[f"{prefix}test_{name}"]
        assert block["final"][f"test_{name}"] == history[-1][f"{prefix}test_{name}"]
        assert block["diff"][name] == pytest.approx(block["best"][f"test_{name}"] - block["final"][f"test_{name}"])
    last5 = [row[f"{prefix}test_ra"] for row in history[-5:]]
    assert block["final"]["epoch"] == 8
    assert block["final"]["last5_ra_mean"] == pytest.approx(statistics.mean(last5))
    assert block["final"]["last5_ra_sd"] == pytest.approx(statistics.stdev(last5))


def accuracy(model, part):
    images, labels = part
    with torch.no_grad():
        return 100 * (model(images.float() / 255).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("checkpoint", ["best", "final"])
@pytest.mark.parametrize(("weights", "which"), [("raw", "raw"), ("smoothed", "smoothed"), ("reported", "smoothed")])
def test_a_loaded_model_has_the_accuracy_that_the_summary_states(smoothed_run, weights, which, checkpoint):
    model = load_model(smoothed_run.path, weights=weights, checkpoint=checkpoint)
    stated = smoothed_run.summary[which][checkpoint]["test_sa"]
    assert accuracy(model, load_data(smoothed_run.path).test) == pytest.approx(stated)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("checkpoint", ["best", "final"])
def test_a_checkpoint_file_loads_by_itself(smoothed_run, checkpoint):
    for weights in ("raw", "smoothed"):
        name = "best_smoothed" if (checkpoint, weights) == ("best", "smoothed") else checkpoint
        from_run = load_model(smoothed_run.path, weights=weights, checkpoint=checkpoint)
        from_file = load_model(smoothed_run.checkpoint(name), weights=weights if checkpoint == "final" else "reported")
        pairs = zip(from_run.state_dict().values(), from_file.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_reported_weights_are_raw_without_a_smoother(plain_run):
    model = load_model(plain_run.path)
    stated = plain_run.summary["raw"]["final"]["test_sa"]
    assert accuracy(model, load_data(plain_run.path).test) == pytest.approx(stated)


@pytest.mark.parametrize("checkpoint", ["best", "final"])
def test_smoothed_weights_that_there_are_not_are_refused(plain_run, checkpoint):
    with pytest.raises(CheckpointError, match="smoothed"):
        load_model(plain_run.path, weights="smoothed", checkpoint=checkpoint)


def test_a_state_to_resume_from_is_no_model(plain_run):
    with pytest.raises(CheckpointError, match="state to resume from"):
        load_model(plain_run.checkpoint("last"))


def test_every_checkpoint_is_plain_tensors(smoothed_run):
    for path in smoothed_run.path.rglob("*.pt"):
        assert torch.load(path, weights_only=True)


def test_the_data_come_back_split_as_they_were(smoothed_run):
    data = load_data(smoothed_run.path)
    images, labels = data.test
    assert images.shape == (700, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.shape == (700,)
    assert (data.train.n, data.val.n) == (90, 10)


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        ({"after": 1}, {}),
        ({"after": 0, "midway": True}, {"smoother": "swa"}),
        ({"after": 3}, {"smoother": "swa"}),
        ({"after": 2, "midway": True}, {"smoother": "iswa"}),
        ({"after": 2}, {"regularizer": "label-smoothing", "method": "standard", "lr_schedule": "cosine"}),
        ({"after": 2}, {"dataset_options": {"pool": 100, "crop": 1, "flip": True, "rotation": 10}, "norm": "L2"}),
        ({"after": 3}, {"precision": "bf16", "test_every": 0, "smoother": "iswa"}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_run_left_alone(tiny, tmp_path, stopped_run, stop, changes, assert_same_outcome):
    whole = train(tiny(**changes), tmp_path / "whole")
    recipe, path = stopped_run(**stop, **changes)
    assert_same_outcome(whole, train(recipe, path, resume=True))


def test_metrics_are_on_the_disk_as_each_epoch_ends(stopped_run):
    _, path = stopped_run(after=3)
    assert [row["epoch"] for row in Run(path).history] == [1, 2, 3]
    assert not Run(path).finished


def test_a_half_written_row_is_mended_by_resuming(tiny, tmp_path, stopped_run, assert_same_outcome):
    whole = train(tiny(), tmp_path / "whole")
    recipe, path = stopped_run(after=2)
    with (path / "metrics.csv").open("a") as file:
        file.write("3,0.1,2.2")
    assert_same_outcome(whole, train(recipe, path, resume=True))


def test_resuming_a_finished_run_leaves_it_as_it_is(tiny, tmp_path, contents):
    run = train(tiny(), tmp_path / "run")
    before = contents(run.path)
    assert train(tiny(), run.path, resume=True).finished
    assert contents(run.path) == before


@pytest.mark.parametrize(("changes", "words"), [({"epochs": 9}, "epochs was 4, is now 9"), ({"seed": 5}, "seed")])
def test_resuming_with_another_recipe_is_refused(tiny, stopped_run, changes, words, contents):
    _, path = stopped_run()
    before = contents(path)
    with pytest.raises(RunError, match=words):
        train(tiny(**changes), path, resume=True)
    assert contents(path) == before


def test_resuming_on_other_data_is_refused(tiny, npz, stopped_run):
    path = npz()
    recipe, out = stopped_run(dataset="npz", dataset_options={}, data_dir=path, batch_size=8)
    npz(x_train=np.zeros((40, 6, 6), np.uint8)).replace(path)
    with pytest.raises(RunError, match=r"data of .* changed"):
        train(recipe, out, resume=True)


def test_resuming_nothing_is_refused(tiny, tmp_path):
    with pytest.raises(RunError, match="no run directory"):
        train(tiny(), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_taken_directory_is_refused(tiny, plain_run, tmp_path, contents):
    (tmp_path / "notes.txt").write_text("mine")
    for path, words in ((plain_run.path, "already holds a run"), (tmp_path, "not an empty folder")):
        before = contents(path)
        with pytest.raises(RunError, match=words):
            train(tiny(), path)
        assert contents(path) == before


def test_a_directory_that_cannot_be_made_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Choose another --out"):
        train(tiny(), tmp_path / "file" / "run")


def test_without_a_directory_a_new_one_is_named_after_the_choices(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [train(tiny(epochs=1, smoother="swa"), None).path.as_posix() for _ in range(2)]
    assert names == ["runs/digits-at-swa", "runs/digits-at-swa-2"]


def test_a_diverged_run_keeps_its_last_good_checkpoint(tiny, tmp_path, distribution):
    source = (
        "from at_smooth import Regularizer\n"
        "class Explosive(Regularizer):\n"
        "    def terms(self, step):\n"
        "        return {'method': step.loss * (float('nan') if step.progress >= 0.5 else 1)}\n"
    )
    distribution(
        "explosive", {"regularizers": {"explosive": "explosive_plugin:Explosive"}}, {"explosive_plugin": source}
    )
    with pytest.raises(DivergedError):
        train(tiny(regularizer="explosive"), tmp_path / "run")
    assert [row["epoch"] for row in Run(tmp_path / "run").history] == [1, 2]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["state"]
    assert state["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert load_model(tmp_path / "run", checkpoint="best")


def test_without_a_test_set_the_summary_has_no_test_figures(tiny, tmp_path, npz):
    path = npz(x_test=np.zeros((0, 6, 6), np.uint8), y_test=np.zeros(0, int))
    run = train(tiny(dataset="npz", dataset_options={}, data_dir=path, batch_size=8), tmp_path / "run")
    blocks = (run.summary["raw"][part] for part in ("best", "final", "diff"))
    figures = dict(chain.from_iterable(block.items() for block in blocks))
    assert {name for name, value in figures.items() if value is not None} == {"epoch", "val_ra"}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no run directory: it holds no recipe\.yaml\.$"):
        Run(tmp_path)


def test_a_folder_of_runs_names_one(tiny, tmp_path):
    for name in ("b", "a"):
        Run.create(tmp_path / name, tiny())
    with pytest.raises(RunError, match=f"such as {tmp_path}/a."):
        Run(tmp_path)


def test_an_unfinished_run_says_how_to_continue(stopped_run):
    _, path = stopped_run()
    with pytest.raises(RunError, match="--resume"):
        _ = Run(path).summary


@pytest.mark.parametrize(
    ("file", "read"), [("summary.json", lambda run: run.summary), ("metrics.csv", lambda run: run.history)]
)
def test_a_damaged_file_is_named(plain_run, tmp_path, file, read):
    run = Run.create(tmp_path / "run", plain_run.recipe)
    (run.path / file).write_bytes(b"\xff{ junk")
    with pytest.raises(FileError, match=f"{file} is no text in UTF-8"):
        read(run)


@pytest.mark.parametrize(("name", "value"), [("weights", "foo"), ("checkpoint", "last")])
def test_load_model_takes_no_other_words(plain_run, name, value):
    with pytest.raises(InputError, match=f"{name} is '{value}'; choose one of"):
        load_model(plain_run.path, **{name: value})


def test_a_file_of_smoothed_weights_holds_no_raw_ones(smoothed_run):
    path = smoothed_run.checkpoint("best_smoothed")
    assert load_model(path, weights="smoothed")
    with pytest.raises(CheckpointError, match="holds no raw weights, but smoothed"):
        load_model(path, weights="raw")


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_summary_is_refused(plain_run, tmp_path, content):
    shutil.copytree(plain_run.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(content)
    with pytest.raises(FileError, match=r"summary\.json"):
        Run(tmp_path / "run").summary  # noqa: B018
