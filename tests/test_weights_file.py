import argparse
import builtins
import pathlib
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from at_smooth import AtSmoothWarning
from at_smooth.exceptions import CheckpointError
from at_smooth.weights_file import load_weights

pytestmark = pytest.mark.filterwarnings("ignore::at_smooth.AtSmoothWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.3))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 9)
    return model


def prefixed(*prefixes, of=None):
    return {".".join([*prefixes, name]): value for name, value in (of or net().state_dict()).items()}


def zeros():
    return {name: torch.zeros_like(value) for name, value in net().state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    def save(content, **options):
        torch.save(content, tmp_path / "w.pt", **options)
        return tmp_path / "w.pt"

    return save


def loaded(file, key=None, model=None):
    """What loading says, once the model has become the network of seed 0."""
    model = model or net(1)
    found = load_weights(model, file, key)
    expected = net().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    return found


STATE = net().state_dict()
WRAPPED = {
    "plain": (STATE, ""),
    "dict": (dict(STATE), ""),
    "DataParallel": (prefixed("module"), ""),
    "DataParallel twice": (prefixed("module", "module"), ""),
    "compiled": (prefixed("_orig_mod"), ""),
    "compiled, then parallel": (prefixed("module", "_orig_mod"), ""),
    "parallel, then compiled": (prefixed("_orig_mod", "module"), ""),
    "compiled within": ({name.replace("conv.", "conv._orig_mod."): value for name, value in STATE.items()}, ""),
    "checkpointed within": (
        {name.replace("bn.", "bn._checkpoint_wrapped_module."): value for name, value in STATE.items()}, ""
    ),
    "Lightning": ({"state_dict": prefixed("model"), "hyper_parameters": {}, "global_step": 3}, "state_dict.model"),
    "model within module": (prefixed("module", "model"), "model"),
    "AveragedModel": (AveragedModel(net()).state_dict(), ""),
    "AveragedModel of DataParallel": ({"n_averaged": torch.tensor(3), **prefixed("module", "module")}, ""),
    "profiled": ({**STATE, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)}, ""),
    "without num_batches_tracked": (
        {name: value for name, value in STATE.items() if "num_batches" not in name}, ""
    ),
    "beside an optimiser": (
        {"model": STATE, "optimizer": torch.optim.Adam(net().parameters()).state_dict(), "epoch": 3}, "model"
    ),
    "nested": ({"ckpt": {"net": prefixed("module")}, "best_acc": torch.tensor(0.9)}, "ckpt.net"),
    "twice the same": ({"state_dict": STATE, "best": dict(STATE)}, "state_dict"),
    **{key: ({key: STATE, "step": 1}, key)
       for key in ("ema", "params", "weights", "model_state", "state_dict_ema", "net")},
    "argparse": (
        {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("x"))}, "state_dict"
    ),
    "NumPy": (
        {"state_dict": STATE, "best": np.float64(0.5), "dtype": np.dtype("float32"), "rng": np.arange(3)}, "state_dict"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_however_they_are_wrapped(saved, kind):
    content, key = WRAPPED[kind]
    model = net(1)
    if kind.startswith("without"):
        model.bn.num_batches_tracked.copy_(STATE["bn.num_batches_tracked"])
    assert loaded(saved(content), model=model).key == key


class Compiled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, AveragedModel])
@pytest.mark.parametrize("content", [STATE, prefixed("module", "_orig_mod")])
def test_the_model_itself_may_be_wrapped(saved, wrap, content):
    if wrap is AveragedModel:
        content = wrap(net()).state_dict()
    model = wrap(net(1))
    load_weights(model, saved(content))
    assert torch.equal(next(model.parameters()), STATE["conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_take_the_precision_of_the_model(saved, dtype):
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in STATE.items()}
    model = net(1)
    load_weights(model, saved(half))
    assert torch.equal(model.conv.weight, STATE["conv.weight"].to(dtype).float())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("raw", "averaged"), [
    ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("raw", "smoothed"), ("params", "params_ema"),
    ("net", "swa_state_dict"), ("model", "ema.shadow"), ("model", "averaged_model"),
])  # fmt: skip
def test_averaged_weights_come_before_raw_ones_and_it_is_said(saved, raw, averaged):
    content = {raw: zeros(), averaged: prefixed("module")}
    found = loaded(saved(content))
    assert found.key == averaged
    assert len(found.notes) == 1
    assert "the averaged ones were taken" in found.notes[0]
    assert f"--weights-key {raw}" in found.notes[0]
    with pytest.warns(AtSmoothWarning, match="averaged ones were taken"):
        load_weights(net(1), saved(content))
    model = net()
    assert load_weights(model, saved(content), raw).key == raw
    assert model.fc.weight.eq(0).all()


def test_raw_weights_at_the_top_of_a_file_have_an_option_too(saved):
    file = saved({**zeros(), "ema": STATE})
    assert "--weights-key ." in loaded(file).notes[0]
    model = net()
    load_weights(model, file, ".")
    assert model.fc.weight.eq(0).all()


def test_averaged_weights_that_do_not_fit_are_mentioned(saved):
    other = {name: value for name, value in zeros().items() if not name.startswith("fc")} | {"head": torch.ones(2)} | {
        "tail": torch.ones(1)}  # fmt: skip
    notes = loaded(saved({"model": STATE, "ema": other})).notes
    assert any("averaged weights under 'ema', too, which do not fit" in note and "fc.weight" in note for note in notes)


@pytest.mark.parametrize("keys", [("best", "last"), ("ema", "swa"), ("student", "teacher")])
def test_several_that_fit_have_to_be_chosen_from(saved, keys):
    file = saved({keys[0]: STATE, keys[1]: zeros()})
    with pytest.raises(
        CheckpointError, match=f"several weights that fit.*'{keys[0]}', '{keys[1]}'.*--weights-key {keys[0]}"
    ):
        load_weights(net(1), file)
    assert loaded(file, keys[0]).key == keys[0]


LEFTOVERS = {
    "a normalisation in front": (
        {"module.0.mean": torch.zeros(1), **prefixed("module", "1")}, "module.1", "module.0.mean"
    ),
    "what may have been a normalisation": (prefixed("1"), "1", "1.conv.weight"),
    "an attacker and a normaliser": (
        {"model": {**prefixed("module", "model"), "module.normalizer.new_mean": torch.zeros(1)}},
        "model.module.model", "module.model.conv.weight",
    ),
    "a loss with weights": (
        {"state_dict": {**prefixed("model"), "loss.weight": torch.ones(2)}}, "state_dict.model", "model.conv"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_nothing_is_left_out_unless_the_option_says_so(saved, kind):
    content, key, named = LEFTOVERS[kind]
    file, model = saved(content), net(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"--weights-key {key}") as error:
        load_weights(model, file)
    assert named in str(error.value)
    assert "missing: conv.weight, conv.bias, bn.weight and 5 more" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert loaded(file, key).key == key


def test_names_that_only_their_wrappers_tell_apart_are_not_mixed_up(saved):
    with pytest.raises(CheckpointError, match=r"unexpected: _orig_mod\.conv\.weight"):
        load_weights(net(1), saved({**STATE, **prefixed("_orig_mod", of=zeros())}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fc.weight": torch.ones(2, 4)}, r"unlike the model's: fc\.weight \(2, 4\), not \(2, 3\)"),
        ({"fc.weight": torch.ones(2, 3, dtype=torch.int64)}, r"fc\.weight of torch\.int64, not torch\.float32"),
        ({"fc.weight": torch.ones(2, 3, dtype=torch.complex64)}, r"fc\.weight of torch\.complex64"),
        ({"fc.weight": torch.ones(2, 3, device="meta")}, r"fc\.weight on the device meta"),
        ({"fc.weight": "text"}, r"missing: fc\.weight"),
        ({"fc.weight": None, "bn.running_var": None}, r"missing: bn\.running_var, fc\.weight"),
        ({"extra.bias": torch.ones(1)}, r"unexpected: extra\.bias"),
    ],
)
def test_what_does_not_fit_is_named(saved, change, words):
    with pytest.raises(CheckpointError, match=words):
        load_weights(net(1), saved({**STATE, **change}))


@pytest.mark.parametrize("key", ["nope", "state_dict.nope", "conv.weight"])
def test_a_key_that_is_not_there_is_refused_with_those_that_are(saved, key):
    with pytest.raises(CheckpointError, match=f"no weights under '{key}', but under 'state_dict' "):
        load_weights(net(1), saved({"state_dict": STATE}), key)


class Runs:
    """A pickle of it calls a function when it is opened."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def test_what_a_file_names_beside_its_weights_is_neither_called_nor_imported(saved, tmp_path):
    touch = f"open({str(tmp_path / 'ran')!r}, 'w')"
    harmful = [Runs(builtins.exec, touch), Runs(builtins.eval, touch)]
    before = set(torch.serialization.get_safe_globals())
    loaded(saved({"state_dict": STATE, "harmful": harmful, "args": argparse.Namespace(a=1)}))
    assert not (tmp_path / "ran").exists()
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Net(), r"whole pickled object \(.*Net\).*state_dict\(\)"),
        ({"model": Net(), "epoch": 1}, r"holds no state dict; 'model' is a pickled .*Net.*state_dict\(\)"),
        (Runs(builtins.exec, "1"), "whole pickled object"),
        ({"state_dict": STATE, "more": defaultdict(list, a=[1])}, r"names.*collections\.defaultdict"),
        ([1], "no state dict"),
        ({"epoch": 1}, "no state dict"),
        ({1: torch.ones(1)}, "no state dict"),
    ],
)
def test_files_without_a_state_dict_say_what_they_are(saved, content, words):
    with pytest.raises(CheckpointError, match=words):
        load_weights(net(1), saved(content))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_archives_of_code_say_what_they_are(tmp_path):
    file = tmp_path / "ts.pt"
    torch.jit.save(torch.jit.script(Net()), file)
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch\.jit\.load\(.*\)\.state_dict\(\)"):
        load_weights(net(1), file)


def test_files_of_old_versions_of_torch_are_read(saved):
    old = {"_use_new_zipfile_serialization": False}
    loaded(saved({"state_dict": prefixed("module")}, **old))
    with pytest.raises(CheckpointError, match=r"more than tensors and plain values.*state_dict\(\)"):
        load_weights(net(1), saved({"state_dict": STATE, "args": argparse.Namespace(a=1)}, **old))


def test_a_file_of_many_keys_or_of_itself_ends(saved):
    deep = {}
    deep["self"] = deep["other"] = deep["third"] = deep
    deep["wide"] = {str(number): {"a": OrderedDict()} for number in range(3000)}
    with pytest.raises(CheckpointError, match="no state dict"):
        load_weights(net(1), saved(deep))
