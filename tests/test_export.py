import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from at_smooth import ExportError, InputError, Recipe, Run, checkpoint, load_data, load_model
from at_smooth.cli import cli
from at_smooth.export import Publication, default_path, export
from at_smooth.network import build_network

SMALLEST = {
    "mlp": {"width": 4, "depth": 1},
    "convnet": {"width": 4},
    "preact-resnet-18": {"width": 2},
    "preact-resnet-50": {"width": 2},
    "vgg-16": {"width": 2},
    "wrn-34-4": {"depth": 10, "width": 1},
    "wrn-34-10": {"depth": 16, "width": 1, "dropout": 0.1},
}

NETS = '''
"""Networks of the working directory."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from at_smooth import Architecture, OptionError
from nets_layers import Scale as Gain, halved

if TYPE_CHECKING:
    from collections.abc import Sequence

# Slopes by name.
SLOPES = {"steep": 0.5}
SLOPES["flat"] = 0.1


@dataclass
class Config:
    hidden: int = 5
    slope: str = "flat"


class Shifted(Gain):
    def forward(self, x):
        return super().forward(x) + 1


class Net(nn.Module):
    def __init__(self, config: Config, sizes: Sequence[int], act=F.leaky_relu):
        super().__init__()
        if not sizes:
            raise OptionError("no sizes")
        pixels, num_classes = sizes
        self.slope, self.act = SLOPES[config.slope], act
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(pixels, config.hidden), Shifted(config.hidden))
        self.head = nn.Linear(config.hidden, num_classes)

    def forward(self, x):
        return self.head(self.act(halved(self.body(x)), self.slope))


def build(num_classes, hidden=5):
    return Net(Config(hidden), [64, num_classes])


def changed(num_classes):
    net = Net(Config(), [64, 3])
    net.head = nn.Linear(5, num_classes)
    return net


class Plugged(Architecture):
    """By a class."""

    hidden: int = 6

    def build(self, shape, num_classes):
        return Net(Config(self.hidden, "steep"), [64, num_classes])


class Changed(Architecture):
    def build(self, shape, num_classes):
        return changed(num_classes)


class Own(nn.Module):
    def __init__(self, plugin):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.body(x)


class Entangled(Architecture):
    def build(self, shape, num_classes):
        return Own(self)


class Grown(Architecture):
    def build(self, shape, num_classes):
        net = nn.Sequential(nn.Flatten())
        net.add_module("head", nn.Linear(64, num_classes))
        return net


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.body(x) * (1 if x.mean() > 2 else 3) if len(x) == 2 else self.body(x)


def moody():
    return Moody()
'''
LAYERS = """
import torch
from torch import nn


def halved(x):
    return x / 2


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gain
"""
OWN = {"nets:build": {"hidden": 7}, "nets:changed": {}, "nets:Plugged": {"hidden": 3}, "nets:Grown": {}}

FRESH = """
import importlib.util, pathlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"at_smooth", "at_smooth_plugins", "pydantic", "nets", "nets_layers"}:
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocked())
import torch

for folder in map(pathlib.Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"model_{folder.name}", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model = module.load_model()
    images, logits = torch.load(folder / "expected.pt", weights_only=True)
    with torch.no_grad():
        print(folder.name, not model.training and torch.equal(model(images), logits))
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Modules in the working directory."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(NETS)
    (folder / "nets_layers.py").write_text(LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
        for name in ("nets", "nets_layers"):
            patch.delitem(sys.modules, name, raising=False)


def saved(folder, model, options, shape=(1, 8, 8), **changes):
    """A run that holds nothing but the final weights of a model, which are random."""
    recipe = Recipe(model=model, model_options=options, device="cpu", **changes)
    network = build_network(recipe, shape, 10, ([0.4] * shape[0], [0.3] * shape[0]))
    rng = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(generator=rng).mul_(0.1)
    run = Run.create(folder, recipe)
    (folder / "checkpoints").mkdir()
    content = {"recipe": recipe.to_dict(), "shape": list(shape), "num_classes": 10, "raw": network.state_dict()}
    checkpoint.save(run.checkpoint("final"), {**content, "fingerprint": "", "smoothed": None, "row": {"epoch": 3}})
    return run


@pytest.fixture(scope="module")
def loaded(nets, tmp_path_factory):
    """Every model exported, then loaded in a process that has torch alone; says which gave equal logits."""
    folder, folders = tmp_path_factory.mktemp("exported"), {}
    for number, (model, options) in enumerate({**SMALLEST, **OWN}.items()):
        shape = (3, 16, 16) if model in SMALLEST else (1, 8, 8)
        run = saved(folder / f"run-{number}", model, options, shape)
        out = folders[model] = export(run.path, folder / str(number))
        images = torch.rand(5, *shape)
        with torch.no_grad():
            torch.save((images, load_model(run.path)(images)), out / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, folders.values())], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    equal = dict(line.split() for line in done.stdout.splitlines())
    return {model: (out, equal.get(out.name)) for model, out in folders.items()}


@pytest.mark.parametrize("model", [*SMALLEST, *OWN])
def test_an_export_gives_equal_logits_in_a_process_that_has_torch_alone(loaded, model):
    folder, equal = loaded[model]
    assert equal == "True"
    imported = [line for line in (folder / "model.py").read_text().splitlines() if line.startswith(("import", "from"))]
    assert {line.split()[1].partition(".")[0] for line in imported} <= {
        *("torch", "__future__", "collections", "dataclasses", "pathlib")
    }


def test_the_definition_is_no_more_than_the_network_needs(loaded):
    text = (loaded["nets:build"][0] / "model.py").read_text()
    assert "# Slopes by name." in text
    assert not [name for name in ("Plugged", "changed", "Moody", "TYPE_CHECKING", "Architecture") if name in text]
    assert "WideResNet(16, 1, 3, 10, 0.1)" in (loaded["wrn-34-10"][0] / "model.py").read_text()


def test_weights_are_plain_tensors(loaded):
    weights = torch.load(loaded["mlp"][0] / "weights.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())


def test_a_model_that_cannot_be_written_says_why_and_what_else_there_is(nets, tmp_path):
    for model, reason in (("nets:Entangled", "its constructor takes Entangled"), ("nets:Changed", "size mismatch")):
        run = saved(tmp_path / model.replace(":", "-"), model, {})
        with pytest.raises(ExportError, match=f"{reason}.*--format torchscript") as raised:
            export(run.path, tmp_path / "out")
        assert "\n" not in str(raised.value).strip()
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


PACKAGE = {
    "blocks.py": """
from torch import nn

class Block(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU())

def _head(width, num_classes):
    return nn.Linear(width, num_classes)
""",
    "nets.py": """
import math
from torch import nn
import torch.nn.functional as F
from at_smooth import Architecture
from .blocks import Block, _head
from . import blocks

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.body, self.head = Block(width), _head(width, num_classes)

    def forward(self, x):
        return self.head(F.relu(self.body(x)) * math.pi)

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = blocks.Block(10)

    def forward(self, x):
        return self.body(x)

class Registered(Architecture):
    width: int = 5

    def build(self, shape, num_classes):
        return Net(self.width, num_classes)

class ByModule(Architecture):
    def build(self, shape, num_classes):
        return Whole()
""",
}


def test_a_registered_model_brings_the_modules_of_its_package(distribution, tmp_path, monkeypatch):
    distribution("others", {"models": {"theirs": "others_nets.nets:Registered", "whole": "others_nets.nets:ByModule"}})
    package = tmp_path / "site-others" / "others_nets"
    package.mkdir()
    for name, text in {"__init__.py": "", **PACKAGE}.items():
        (package / name).write_text(text)
    folder = export(saved(tmp_path / "run", "theirs", {"width": 3}).path, tmp_path / "out")
    text = (folder / "model.py").read_text()
    assert text.index("class Block") < text.index("class Net") < text.index("Net(3, 10)")
    assert not [line for line in text.splitlines() if "others_nets" in line or line.startswith("from .")]
    with pytest.raises(ExportError, match=r"from others_nets\.blocks import"):
        export(saved(tmp_path / "run-2", "whole", {}).path, tmp_path / "out-2")


def test_constructors_are_as_they_were(nets, tmp_path):
    before = nn.Linear.__init__, nn.ReLU.__dict__.get("__init__"), nn.Flatten.__init__
    export(saved(tmp_path / "run", "nets:Grown", {}).path, tmp_path / "out")
    assert before == (nn.Linear.__init__, nn.ReLU.__dict__.get("__init__"), nn.Flatten.__init__)


def test_torchscript_gives_the_same_logits_for_any_number_of_images(nets, tmp_path, recwarn):
    run = saved(tmp_path / "run", "nets:Entangled", {})
    folder = export(run.path, tmp_path / "out", "torchscript")
    assert not recwarn.list
    images = torch.rand(7, 1, 8, 8)
    traced = torch.jit.load(folder / "model.pt")
    assert torch.allclose(traced(images), load_model(run.path)(images), atol=1e-5)
    assert "torch.jit.load" in (folder / "README.md").read_text()


def test_a_trace_that_is_another_network_is_refused(nets, tmp_path):
    run = saved(tmp_path / "run", "nets:moody", {})
    with pytest.raises(ExportError, match="--format robustbench"):
        export(run.path, tmp_path / "out", "torchscript")
    assert not (tmp_path / "out").exists()
    assert export(run.path, tmp_path / "out").is_dir()


def test_onnx_names_what_it_needs(plain_run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    with pytest.raises(ExportError, match="pip install onnx"):
        export(plain_run.path, tmp_path / "out", "onnx")


def test_onnx_gives_the_same_logits(plain_run, tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    folder = export(plain_run.path, tmp_path / "out", "onnx")
    images = torch.rand(7, 1, 8, 8)
    [logits] = reference.ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"images": images.numpy()})
    assert torch.allclose(torch.as_tensor(logits), load_model(plain_run.path)(images), atol=1e-5)


@pytest.mark.parametrize("weights", ["reported", "raw", "smoothed"])
@pytest.mark.parametrize("which", ["final", "best"])
def test_the_chosen_weights_are_exported_with_their_figures(smoothed_run, tmp_path, weights, which):
    folder = export(smoothed_run.path, tmp_path / "out", weights=weights, checkpoint=which)
    expected = load_model(smoothed_run.path, weights=weights, checkpoint=which).state_dict()
    stored = torch.load(folder / "weights.pt", weights_only=True)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    results = json.loads((folder / "results.json").read_text())
    kind = "smoothed" if weights == "reported" else weights
    block = smoothed_run.summary[kind][which]
    assert (results["weights"], results["epoch"]) == (kind, block["epoch"])
    assert (results["test_sa"], results["test_ra"], results["test_examples"]) == (
        block["test_sa"], block["test_ra"], 700)  # fmt: skip
    info = json.loads((folder / "model_info.json").read_text())
    assert info["clean_acc"] == f"{block['test_sa']:.2f}"


def test_a_checkpoint_file_knows_its_run(smoothed_run, tmp_path):
    folder = export(smoothed_run.checkpoint("best_smoothed"), tmp_path / "out")
    results = json.loads((folder / "results.json").read_text())
    assert results["test_ra"] == smoothed_run.summary["smoothed"]["best"]["test_ra"]
    alone = tmp_path / "alone.pt"
    alone.write_bytes(smoothed_run.checkpoint("best_smoothed").read_bytes())
    results = json.loads((export(alone, tmp_path / "other") / "results.json").read_text())
    assert (results["summary"], results["evaluations"]) == (None, [])
    assert default_path(alone, "robustbench") == tmp_path / "export-robustbench"


def test_the_recipe_trains_the_same_but_names_no_path_of_this_machine(plain_run, tmp_path):
    folder = export(plain_run.path, tmp_path / "out")
    assert Recipe.from_yaml(folder / "recipe.yaml") == plain_run.recipe
    recipe = saved(tmp_path / "run", "mlp", {}, data_dir=tmp_path).path
    text = "".join(path.read_text() for path in export(recipe, tmp_path / "b").iterdir() if path.suffix != ".pt")
    assert str(tmp_path) not in text
    assert "--data-dir DIR" in text


def card_of(folder):
    lines = (folder / "README.md").read_text().splitlines()
    return {line[4:].partition("**:")[0]: line.partition("**:")[2].strip() for line in lines if line.startswith("- **")}


def test_the_card_is_filled_in(tmp_path):
    run = saved(tmp_path / "run", "preact-resnet-18", {"width": 1}, (3, 8, 8), dataset="cifar10", eps="8/255")
    publication = Publication("A Title", "A. Author, B. Author", "ICLR 2021", "https://example.org")
    folder = export(run.path, tmp_path / "out", publication=publication)
    card, info = card_of(folder), json.loads((folder / "model_info.json").read_text())
    assert info["eps"] == "8/255"
    assert card["eps"].startswith("8/255 = 0.0313725")
    assert (card["Threat model"], card["Paper URL"]) == ("Linf", "https://example.org")
    assert card["Dataset"] == "cifar10 (crop=4, flip=True, rotation=0.0)"
    assert (info["name"], info["authors"], info["venue"]) == ("A Title", "A. Author, B. Author", "ICLR 2021")
    assert card["Clean accuracy"] == card["Robust accuracy"] == "not measured"
    assert (info["clean_acc"], info["autoattack_acc"], info["additional_data"]) == (None, None, False)


ATTACKED = {"evaluator": "autoattack", "accuracy": 12.5, "ci95": [10, 15], "seconds": 1.0, "version": "standard"}
WHOLE = {"broke": dict.fromkeys(["clean", "apgd-ce", "apgd-t", "fab-t", "square"], 1)}


@pytest.fixture
def evaluated(plain_run, tmp_path):
    """Exports a run that keeps an evaluation; gives the card, the leaderboard's fields, the results and the notes."""

    def make(changes=None, result=None, name="autoattack", **files):
        run = Run.create(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", plain_run.recipe)
        (run.path / "checkpoints").mkdir()
        for path in ("summary.json", "checkpoints/final.pt"):
            (run.path / path).write_bytes((plain_run.path / path).read_bytes())
        (run.path / "evaluations").mkdir()
        evaluation = {
            "n": 700,
            "threat": {"norm": plain_run.recipe.norm, "eps": plain_run.recipe.eps},
            "checkpoint": "somewhere/else/checkpoints/final.pt",
            "weights": "raw",
            "part": "test",
            "dataset": "digits",
            "fingerprint": load_data(plain_run.path).fingerprint(),
            "results": {"clean": {"accuracy": 50.0, "ci95": [46, 54]}, name: {**ATTACKED, **WHOLE, **(result or {})}},
            **(changes or {}),
        }
        (run.path / "evaluations" / "evaluation-1.json").write_text(json.dumps(evaluation))
        for stem, text in files.items():
            (run.path / "evaluations" / f"{stem}.json").write_text(text)
        notes = []
        folder = export(run.path, run.path / "out", note=notes.append)
        files = (json.loads((folder / f"{name}.json").read_text()) for name in ("model_info", "results"))
        return card_of(folder), *files, notes

    return make


def test_autoattack_is_on_the_card_where_it_was_run(evaluated):
    card, info, results, notes = evaluated()
    assert info["autoattack_acc"] == info["reported"] == "12.50"
    assert card["Robust accuracy"].startswith("12.50 % (95 % interval 10.3 to 15.2, on 700 images), by AutoAttack")
    assert "square" in card["Evaluation method"]
    assert [each["checkpoint"] for each in results["evaluations"]] == ["final.pt"]
    assert not notes


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "smoothed"},
        {"checkpoint": "checkpoints/best.pt"},
        {"threat": {"norm": "L2", "eps": 0.1}},
        {"threat": {"norm": "Linf", "eps": 0.05}},
        {"part": "train"},
        {"fingerprint": "of other images"},
        {"results": {"autoattack": {**ATTACKED, "evaluator": "clean"}}},
    ],
)
def test_an_evaluation_of_something_else_is_not_on_the_card(evaluated, changes, plain_run):
    card, info, results, notes = evaluated(changes)
    assert info["autoattack_acc"] is None
    assert info["reported"] == f"{plain_run.summary['raw']['final']['test_ra']:.2f}"
    assert "AutoAttack was not run" in card["Evaluation method"]
    assert "by PGD-2" in card["Robust accuracy"]
    assert len(results["evaluations"]) == 1
    assert any("--with autoattack" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "result"),
    [({"n": 100}, {}), ({}, {"version": "rand"}), ({}, {"broke": {"clean": 1, "apgd-ce": 3}})],
)
def test_less_than_the_leaderboards_evaluation_is_no_claim(evaluated, changes, result):
    card, info, _, notes = evaluated(changes, result)
    assert info["autoattack_acc"] is None
    assert card["Robust accuracy"].startswith("12.50 %")
    assert "not in its standard version on the whole test set" in card["Evaluation method"]
    assert notes


def test_damaged_evaluations_are_left_out_with_a_note(evaluated):
    facts = {"n": 7, "threat": {"norm": "L2", "eps": 0.1}, "checkpoint": "a/final.pt", "weights": "raw", "part": "test"}
    audit = {**facts, "dataset": "digits", "results": {"gain": {"sound": True, "found": "nothing"}}}
    text = {**audit, "results": {"pgd": {"accuracy": "much", "ci95": [1, 2]}}}
    deep = "[" * 10_000 + "]" * 10_000
    _, info, results, notes = evaluated(
        cut='{"n": 7', odd="[]", deep=deep, text=json.dumps(text), audit=json.dumps(audit)
    )
    assert info["autoattack_acc"] == "12.50"
    assert len(results["evaluations"]) == 2
    assert len(notes) == 4
    for note, name in zip(notes, ["cut.json is no JSON", "deep.json", "odd.json", "text.json"], strict=True):
        assert note.startswith("left out: ")
        assert name in note


def test_nothing_is_written_over(plain_run, tmp_path, contents):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="Choose another --out"):
        export(plain_run.path, tmp_path / "out")
    with pytest.raises(InputError, match="no format 'pickle'"):
        export(plain_run.path, tmp_path / "new", "pickle")
    assert contents(tmp_path) == before


def test_the_command_exports_into_the_run(plain_run, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for path in ("recipe.yaml", "summary.json", "checkpoints/final.pt"):
        (run / path).write_bytes((plain_run.path / path).read_bytes())

    def call(*arguments):
        return CliRunner().invoke(cli, ["export", str(run), *arguments])

    done = call("--name", "A Title", "--paper", "https://example.org", "--extra-data")
    assert done.exit_code == 0, done.output
    folder = run / "export-robustbench"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "model.py", "model_info.json", "recipe.yaml", "results.json", "weights.pt")
    }
    info = json.loads((folder / "model_info.json").read_text())
    assert (info["name"], info["link"], info["additional_data"]) == ("A Title", "https://example.org", True)
    assert str(folder) in done.stdout
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"] == "mlp"
    again = call()
    assert again.exit_code == 2
    assert again.stderr.startswith("Error: ")
    assert "Traceback" not in again.output
    missing = call("--weights", "smoothed", "--out", str(tmp_path / "new"))
    assert (missing.exit_code, (tmp_path / "new").exists()) == (2, False)
