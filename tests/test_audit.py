import json
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from at_smooth import PluginError, Threat, load_data, load_model, train, trust_code
from at_smooth.audit import audit
from at_smooth.audit_bench import Limits
from at_smooth.cli import cli
from at_smooth.data import Part
from at_smooth.runtime import Runtime
from at_smooth.surrogate import trained_surrogate

CPU = Runtime(torch.device("cpu"))
CHECKS = ["repeats itself", "gradients", "slope", "falls to zero", "monotone in eps", "steps and restarts", "noise",
          "transfer", "autoattack"]  # fmt: skip


class Masked(nn.Module):
    """A standard-trained model behind something that hides its gradients."""

    def __init__(self, model, how):
        super().__init__()
        self.model = model
        self.how = how

    def forward(self, images):
        if self.how == "quantised":
            images = (4 * images).round() / 4
        if self.how == "cut":
            images = images.detach()
        if self.how == "random":
            images = images + 0.2 * torch.randn_like(images)
        logits = self.model(images)
        return 1e3 * logits if self.how == "saturated" else logits


#: Checks that take a moment.
QUICK = {"reference": "fgsm", "surrogate": "mlp", "more_steps": 20, "restarts": 1}


@pytest.fixture(scope="module")
def digits(tiny):
    """Makes a run on the digits that is fit to be audited."""
    common = {"dataset_options": {"pool": 400, "label_noise": 0}, "model_options": {"width": 64, "depth": 1}}
    return lambda **changes: tiny(**common, epochs=12, **changes)


@pytest.fixture(scope="module")
def honest(digits, tmp_path_factory):
    """An adversarially trained run."""
    return train(digits(attack_options={"steps": 5}), tmp_path_factory.mktemp("honest") / "run")


@pytest.fixture(scope="module")
def standard(digits, tmp_path_factory):
    """A standard-trained run, robust to nothing."""
    return train(digits(method="standard"), tmp_path_factory.mktemp("standard") / "run")


def audited(model, run, n=60, **limits):
    data, threat = load_data(run.path), run.recipe.threat
    part = data.test._replace(images=data.test.images[:n], labels=data.test.labels[:n])
    return {each.check: each for each in audit(model, part, data.train, threat, limits=Limits(**limits), runtime=CPU)}


def test_an_honestly_trained_model_is_sound(honest):
    verdicts = audited(load_model(honest.path), honest, n=100)
    assert list(verdicts) == CHECKS
    assert not [each for each in verdicts.values() if not each.sound]
    assert verdicts["falls to zero"].figures["ra_at_any_image"] == 0
    assert verdicts["transfer"].figures["imitation_agrees"] > 60


def test_a_model_that_is_robust_to_nothing_is_sound_all_the_same(standard):
    assert all(each.sound for each in audited(load_model(standard.path), standard, **QUICK).values())


@pytest.mark.parametrize(
    ("how", "limits", "suspicious"),
    [
        ("saturated", {}, {"gradients", "slope", "transfer", "autoattack"}),
        ("quantised", QUICK, {"gradients", "slope", "transfer"}),
        ("cut", QUICK, {"gradients", "slope", "transfer"}),
        ("random", QUICK, {"repeats itself"}),
    ],
)
def test_masked_gradients_are_found(standard, how, limits, suspicious):
    verdicts = audited(Masked(load_model(standard.path), how), standard, **limits)
    assert suspicious <= {each.check for each in verdicts.values() if not each.sound}


def test_a_limit_decides_the_verdict(honest):
    strict = audited(load_model(honest.path), honest, rise=-200, **QUICK)
    assert {name for name, each in strict.items() if not each.sound} == {"monotone in eps", "steps and restarts"}
    assert "fgsm" in strict  # the reference is whatever evaluator one trusts


def test_a_radius_that_allows_any_image_is_audited_too(honest):
    data = load_data(honest.path)
    part = data.test._replace(images=data.test.images[:30], labels=data.test.labels[:30])
    threat, limits = Threat("Linf", 1.0), Limits(**QUICK)
    verdicts = audit(load_model(honest.path), part, data.train, threat, limits=limits, runtime=CPU)
    assert {each.check: each.sound for each in verdicts}["monotone in eps"]


def test_an_audit_disturbs_nothing(honest):
    model = load_model(honest.path)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = audited(model, honest, n=20, **QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    torch.manual_seed(8)
    assert audited(model, honest, n=20, **QUICK) == first


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


FAST = ["--n-examples", "40", *(part for item in QUICK.items() for part in ("--set", "=".join(map(str, item))))]


def test_the_command_exits_0_for_a_sound_run_and_keeps_its_report(honest, tmp_path):
    result = call("audit", honest.path, *FAST, "--json", tmp_path / "audit.json")
    assert result.exit_code == 0, result.output
    assert "sound: nothing here speaks for masked gradients" in result.stdout
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["sound"] is True
    assert content["n"] == 40
    assert content["threat"] == {"norm": "Linf", "eps": 0.1}
    assert list(content["results"])[:-1] == CHECKS[:-1]
    [kept] = honest.path.glob("evaluations/audit-*.json")
    assert json.loads(kept.read_text()) == content


def test_the_command_exits_4_for_a_masked_model_and_says_which_checks_failed(standard, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pt"
    torch.save(load_model(standard.path).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masked_net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    def forward(self, images):\n"
        "        return self.body(images.round())\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    result = call("audit", "masked_net:make", "--dataset", "digits", "--norm", "Linf", "--eps", "0.1", *FAST)
    assert result.exit_code == 4, result.output
    assert "Error: not sound: " in result.stderr
    assert "gradients" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("body", "words"),
    [("raise ValueError('no such width')", r"Net fails in build\(\): ValueError: no such width"),
     ("return 3", r"Net: build\(\) returned 3; it should return a network")],
)  # fmt: skip
def test_a_surrogate_that_is_no_network_is_named(tmp_path, monkeypatch, body, words):
    lines = ["import at_smooth", "class Net(at_smooth.Architecture):", "    def build(self, shape, num_classes):"]
    (tmp_path / "own_surrogate.py").write_text("\n".join([*lines, f"        {body}", ""]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_surrogate", raising=False)
    trust_code(["own_surrogate:Net"])
    images = Part(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(PluginError, match=words):
        trained_surrogate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images, 10, "own_surrogate:Net", 0, CPU)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--set", "nonsense=1"], "nonsense"),
        (["--set", "steps=0"], "steps"),
        (["--set", "reference=nobody"], "nobody"),
        (["--set", "surrogate=nobody"], "nobody"),
        (["--eps", "0"], "eps"),
        (["--n-examples", "0"], "--n-examples"),
        (["--n-examples", "29"], "30 or more"),
        (["--set", "zero=nan"], "zero"),
        (["--norm", "L2"], "--eps"),
    ],
)
def test_bad_input_is_refused_by_name(honest, arguments, word):
    result = call("audit", honest.path, *(FAST if "--n-examples" not in arguments else []), *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output
