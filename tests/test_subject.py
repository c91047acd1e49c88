import os
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from at_smooth import (
    CheckpointError,
    DataError,
    InputError,
    OptionError,
    PluginError,
    checkpoint,
    load_data,
    load_model,
)
from at_smooth.exceptions import RunError
from at_smooth.subject import Wanted, find_subject
from at_smooth.weights_file import load_weights

MODULE = """
import torch
from torch import nn

def net(num_classes, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def shape_lover():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))

def needy(argument):
    return net(10)

def unlucky():
    raise ValueError("no luck today")

class TwoArguments(nn.Module):
    def forward(self, one, other):
        return one

def two_arguments():
    return TwoArguments()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


def same_model(one, other):
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("weights", ["reported", "raw", "smoothed"])
@pytest.mark.parametrize("checkpoint", ["final", "best"])
def test_a_run_gives_the_weights_that_are_wanted(smoothed_run, weights, checkpoint):
    subject = find_subject(str(smoothed_run.path), Wanted(weights=weights, checkpoint=checkpoint))
    assert same_model(subject.model, load_model(smoothed_run.path, weights=weights, checkpoint=checkpoint))
    assert not subject.model.training
    kind = "raw" if weights == "raw" else "smoothed"
    name = "final" if checkpoint == "final" else "best" if kind == "raw" else "best_smoothed"
    assert subject.facts == {
        "checkpoint": str(smoothed_run.path / "checkpoints" / f"{name}.pt"),
        "weights": kind,
        "dataset": "digits",
        "part": "test",
        "fingerprint": load_data(smoothed_run.path).fingerprint(),
    }


def test_raw_and_smoothed_differ(smoothed_run):
    raw, smoothed = (find_subject(str(smoothed_run.path), Wanted(weights=each)).model for each in ("raw", "smoothed"))
    assert not same_model(raw, smoothed)


def test_a_run_brings_data_threat_and_threads(plain_run):
    subject = find_subject(str(plain_run.path))
    assert subject.threat == plain_run.recipe.threat
    assert (subject.run, subject.threads) == (plain_run.path, plain_run.recipe.threads)
    data = load_data(plain_run.path)
    for name in ("test", "val", "train"):
        part = find_subject(str(plain_run.path), Wanted(part=name)).part
        assert torch.equal(part.images, getattr(data, name).images)
        assert torch.equal(part.labels, getattr(data, name).labels)


def test_a_checkpoint_will_do_wherever_it_is(plain_run, tmp_path):
    source = plain_run.path / "checkpoints" / "best.pt"
    subject = find_subject(str(source))
    assert subject.run == plain_run.path
    (tmp_path / "deep" / "down").mkdir(parents=True)
    moved = shutil.copy(source, tmp_path / "deep" / "down" / "my:best.pt")
    other = find_subject(str(moved))
    assert same_model(subject.model, other.model)
    assert other.run is None
    assert other.facts["checkpoint"] == str(moved)
    assert torch.equal(other.part.images, subject.part.images)


def test_a_run_may_move(plain_run, tmp_path):
    moved = shutil.copytree(plain_run.path, tmp_path / "elsewhere")
    assert same_model(find_subject(str(moved)).model, find_subject(str(plain_run.path)).model)


@pytest.mark.parametrize(
    ("wanted", "norm", "eps"),
    [
        (Wanted(), "Linf", 0.1),
        (Wanted(eps="8/255"), "Linf", 8 / 255),
        (Wanted(norm="Linf"), "Linf", 0.1),
        (Wanted(norm="L2", eps=0.5), "L2", 0.5),
        (Wanted(eps=0), "Linf", 0),
    ],
)
def test_the_threat_is_the_runs_unless_one_says_otherwise(plain_run, wanted, norm, eps):
    threat = find_subject(str(plain_run.path), wanted).threat
    assert (threat.norm, threat.eps) == (norm, eps)


def test_a_data_set_that_brings_a_validation_part_can_be_evaluated_on_it(plain_run, npz):
    own = np.random.default_rng(1).integers(0, 256, (6, 6, 6), dtype=np.uint8)
    path = npz(x_val=own, y_val=np.arange(6) % 2)
    part = find_subject(str(plain_run.path), Wanted(dataset="npz", data_dir=path, part="val")).part
    assert np.array_equal(part.images[:, 0], own)
    assert part.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_another_data_set_takes_the_runs_place(plain_run):
    wanted = Wanted(dataset="digits", dataset_options={"pool": 50, "label_noise": 0}, part="train")
    subject = find_subject(str(plain_run.path), wanted)
    assert (subject.part.n, subject.data.train.n, subject.data.val.n) == (50, 50, 0)
    assert subject.facts["dataset"] == "digits"


def test_a_data_set_without_a_test_set_can_be_evaluated_on_its_training_images(tmp_path, toy_images, npz):
    rng = np.random.default_rng(1)
    path = npz(x_train=rng.random((20, 1, 8, 8)), y_train=np.arange(20) % 10,
               x_test=rng.random((0, 1, 8, 8)), y_test=np.zeros(0, dtype=int))  # fmt: skip
    wanted = {"dataset": "npz", "data_dir": path, "norm": "Linf", "eps": 0.1}
    assert find_subject("my_models:net", Wanted(**wanted, part="train")).part.n == 20
    with pytest.raises(InputError, match="test"):
        find_subject("my_models:net", Wanted(**wanted))


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (Wanted(norm="L2"), OptionError, "another norm needs its own radius: give --eps"),
        (Wanted(eps="junk"), OptionError, "neither a number nor a fraction"),
        (Wanted(eps=-1), OptionError, "no radius"),
        (Wanted(eps="nan"), OptionError, "no radius"),
        (Wanted(norm="L1", eps=1), OptionError, "no norm 'L1'"),
        (Wanted(part="valid"), InputError, "no part 'valid'. Parts: test, val, train"),
        (Wanted(dataset_options={"pool": 50}), OptionError, "name it too, with --dataset"),
        (Wanted(dataset="digts"), PluginError, "did you mean 'digits'"),
        (Wanted(dataset="digits", part="val"), OptionError, "no validation part"),
        (Wanted(dataset="digits", dataset_options={"pol": 50}), OptionError, "pol"),
        (Wanted(dataset="npz"), DataError, "--data-dir"),
        (Wanted(weights="smoothed"), CheckpointError, "holds no smoothed weights, but raw"),
        (Wanted(weights_file="w.pt"), OptionError, "not for runs"),
        (Wanted(model_options={"hidden": 3}), OptionError, "not for runs"),
    ],
)
def test_what_a_run_cannot_give_is_refused(plain_run, wanted, error, words):
    with pytest.raises(error, match=words):
        find_subject(str(plain_run.path), wanted)


class Code:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def spoilt(plain_run, tmp_path):
    """Makes a file that is no good, of some kind."""
    good = (plain_run.path / "checkpoints" / "final.pt").read_bytes()
    path = tmp_path / "file.pt"

    def make(kind):
        contents = {"empty": b"", "text": b"hello", "truncated": good[: len(good) // 2], "tail": good[-500:]}
        if kind in contents:
            path.write_bytes(contents[kind])
        elif kind == "bare":
            checkpoint.save(path, {"weights": {}})
        elif kind != "missing":
            torch.save({"code": Code(tmp_path / "ran"), "list": [1], "foreign": {"format": 99, "raw": {}},
                        "tensor": torch.ones(2)}[kind], path)  # fmt: skip
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no checkpoint at"),
        ("empty", "no readable checkpoint|no checkpoint"),
        ("text", "no readable checkpoint|no checkpoint"),
        ("truncated", "no readable checkpoint"),
        ("tail", "no readable checkpoint|no checkpoint"),
        ("code", "not opened, since such a file could run code"),
        ("list", "not written by this version"),
        ("tensor", "not written by this version"),
        ("foreign", "not written by this version"),
        ("bare", "holds no raw weights"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(spoilt, tmp_path, kind, words):
    with pytest.raises(CheckpointError, match=words):
        find_subject(str(spoilt(kind)))
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run directory"):
        find_subject(str(tmp_path))


def test_a_run_that_is_not_finished_says_so(stopped_run):
    _, path = stopped_run()
    with pytest.raises(CheckpointError, match=r"final\.pt"):
        find_subject(str(path))
    assert find_subject(str(path), Wanted(checkpoint="best")).part.n == 700


# Subsets


@pytest.mark.parametrize("n", [10, 50, 333, 699])
def test_a_subset_has_the_classes_in_their_proportions(plain_run, n):
    subject = find_subject(str(plain_run.path))
    part = subject.subset(n, 0).part
    assert part.n == n
    expected = n * subject.part.labels.bincount() / 700
    assert (part.labels.bincount(minlength=10) - expected).abs().max() <= (1.5 if n < 699 else 2)


def test_a_subset_follows_the_seed(plain_run):
    subject = find_subject(str(plain_run.path))
    one, again, other = (subject.subset(40, seed).part.images for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_subset_holds_images_with_their_own_labels_once_each(plain_run):
    subject = find_subject(str(plain_run.path))
    subject.part.images.copy_(torch.zeros_like(subject.part.images))
    subject.part.images.view(700, -1)[:, 0] = torch.arange(700) % 256
    subject.part.images.view(700, -1)[:, 1] = torch.arange(700) // 256
    part = subject.subset(99, 3).part
    numbers = part.images.view(99, -1)[:, 0].long() + 256 * part.images.view(99, -1)[:, 1].long()
    assert len(set(numbers.tolist())) == 99
    assert torch.equal(part.labels, subject.part.labels[numbers])
    assert (numbers.diff() > 0).all()


def test_the_whole_is_a_subset_and_none_means_the_whole(plain_run):
    subject = find_subject(str(plain_run.path))
    assert torch.equal(subject.subset(700, 5).part.images, subject.part.images)
    assert subject.subset(None, 5) is subject
    assert subject.subset(1, 0).part.n == 1


@pytest.mark.parametrize("n", [0, -3, 701])
def test_a_subset_of_so_many_is_refused(plain_run, n):
    with pytest.raises(OptionError, match=f"--n-examples is {n}; there are 700"):
        find_subject(str(plain_run.path)).subset(n, 0)


# Anyone's model

MADE = {"dataset": "digits", "norm": "Linf", "eps": "0.1"}


def made(target="net", **changes):
    return find_subject(f"my_models:{target}", Wanted(**{**MADE, **changes}))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))


def test_a_functions_model_is_a_subject(tmp_path):
    subject = made(model_options={"hidden": 7})
    assert subject.model[1].out_features == 7
    assert not subject.model.training
    assert (subject.part.n, subject.threat.eps, subject.run) == (700, 0.1, None)
    assert subject.facts == {
        "checkpoint": "my_models:net", "weights": "my_models:net", "dataset": "digits", "part": "test",
        "fingerprint": subject.data.fingerprint(),
    }  # fmt: skip
    assert made(part="train").part.n == 600


WRAPPED = {
    "plain": lambda state: state,
    "ordinary dict": dict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "net and module": lambda state: {"acc": 91.0, "net": {f"module.{name}": value for name, value in state.items()}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "half precision": lambda state: {name: value.half().float() for name, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_weights_are_found_however_they_are_wrapped(network, tmp_path, wrap):
    state = WRAPPED[wrap](network.state_dict())
    torch.save(state, tmp_path / "w.pt")
    subject = made(weights_file=tmp_path / "w.pt")
    if wrap == "half precision":
        network.load_state_dict(state)
    assert same_model(subject.model, network)
    assert subject.facts["checkpoint"] == str(tmp_path / "w.pt")


def test_old_files_of_weights_are_read(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same_model(made(weights_file=tmp_path / "w.pth").model, network)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no file of weights at"),
        ("empty", "no readable file of weights|could run code"),
        ("text", "no readable file of weights|more than tensors"),
        ("truncated", "no readable file of weights"),
        ("code", "not opened, since such a file could run code"),
        ("list", "holds no state dict"),
        ("tensor", "holds no state dict"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_and_runs_nothing(spoilt, tmp_path, kind, words):
    with pytest.raises(CheckpointError, match=words):
        made(weights_file=spoilt(kind))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "state",
    [
        {"1.weight": torch.ones(4, 64)},
        {"1.weight": torch.ones(3, 64), "1.bias": torch.ones(3)},
        {"1.weight": "text"},
        {"state_dict": {1: torch.ones(2)}},
        {"state_dict": {"1.weight": 3}},
        {},
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        made(weights_file=tmp_path / "w.pt")


def test_a_checkpoint_of_ours_is_no_file_of_weights_for_another_network(plain_run):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        made(weights_file=plain_run.path / "checkpoints" / "final.pt")


def test_safetensors_are_read_or_asked_for(network, tmp_path):
    path = tmp_path / "w.safetensors"
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        path.write_bytes(b"anything")
        with pytest.raises(CheckpointError, match="pip install safetensors"):
            load_weights(network, path)
        return
    save_file(network.state_dict(), path)
    assert same_model(made(weights_file=path).model, network)


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("net", {"dataset": None}, "give --dataset, --norm and --eps"),
        ("net", {"norm": None}, "give --dataset, --norm and --eps"),
        ("net", {"eps": None}, "give --dataset, --norm and --eps"),
        ("net", {"part": "val"}, "no validation part"),
        ("net", {"model_options": {"hiden": 3}}, "hiden"),
        ("nothing", {}, r"package\.module:name"),
        ("needy", {}, "argument"),
        ("shape_lover", {}, "shape|shapes|images"),
        ("unlucky", {}, "no luck today"),
        ("two_arguments", {}, "argument"),
    ],
)
def test_functions_that_make_no_subject_are_refused(target, changes, words):
    with pytest.raises(InputError, match=words):
        made(target, **changes)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(PluginError, match="no_such_module"):
        find_subject("no_such_module:net", Wanted(**MADE))


@pytest.mark.parametrize("own", [True, False])
def test_finding_a_subject_leaves_the_global_generators_alone(plain_run, own):
    source, wanted = (str(plain_run.path), Wanted()) if own else ("my_models:net", Wanted(**MADE))
    before = torch.get_rng_state()
    find_subject(source, wanted).subset(20, 0)
    assert torch.equal(torch.get_rng_state(), before)
