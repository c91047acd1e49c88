"""What authors of plugins get wrong: each is one message that names the plugin, the method and what it should be."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from pydantic import Field, PrivateAttr, field_validator
from torch import nn
from torch.optim.swa_utils import AveragedModel

from at_smooth import (
    CLEAN,
    Analysis,
    Architecture,
    AtSmoothWarning,
    AttackSpec,
    Dataset,
    DivergedError,
    Engine,
    Evaluator,
    InputError,
    Method,
    OptionError,
    PluginError,
    Regularizer,
    Runtime,
    Settings,
    Threat,
    WeightSmoother,
    create,
)
from at_smooth.cli import cli
from at_smooth.contracts import attack_of, learning_network_of, loaded, studied
from at_smooth.plugin_class import check_plugin

ATTACK = AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def fit(toy_data):
    """Trains two epochs with a plugin of one's own; gives the engine."""

    def train(plugin=None, *, model=None, epochs=2):
        chosen = {"method": create("methods", "at")}
        for kind, cls in (("method", Method), ("regularizer", Regularizer), ("smoother", WeightSmoother)):
            if isinstance(plugin, cls):
                chosen[kind] = plugin
        settings = Settings(epochs=epochs, batch_size=18, eval_steps=1, test_every=0, lr=0.05)
        engine = Engine(
            model or network(), toy_data(), attack=ATTACK, settings=settings, runtime=Runtime.choose("cpu"), **chosen
        )
        engine.fit()
        return engine

    return train


def ce(model, images, targets):
    logits = model(images)
    return F.cross_entropy(logits, targets), logits


def made(base, name="Wrong", **methods):
    """A plugin with these methods, which take what the interface gives them."""
    return type(name, (base,), {"__module__": __name__, **methods})()


# --- what is returned

TERMS = [
    (lambda step: step.loss, r"a tensor \(\) of float32; it should return a dict of scalar tensors"),
    (lambda step: None, "returned None; it should return a dict"),
    (lambda step: {}, r"returned \{\}; it should return a dict"),
    (lambda step: {1: step.loss}, "a term named 1"),
    (lambda step: {"method": 1.5}, "as 'method' 1.5; it should return a dict of scalar tensors"),
    (lambda step: {"a": step.loss, "b": np.float32(1)}, "as 'b' a float32"),
    (lambda step: {"a": step.loss, "b": step.labels.sum()}, r"as 'b' a tensor \(\) of int64"),
    (lambda step: {"a": step.loss.expand(18)}, r"as 'a' a tensor \(18,\) of float32; each term is a scalar.*mean\(\)"),
    (lambda step: {"a": step.loss, "b": step.logits.amax(1)}, r"as 'b' a tensor \(18,\) .*mean\(\)"),
    (lambda step: {"a": step.loss[None]}, r"as 'a' a tensor \(1,\)"),
    (lambda step: {"a": step.loss.detach()}, "returned 'a' without gradient"),
    (lambda step: {"a": step.loss, "b": step.logits.mean() * float("nan")}, "as 'b' nan before any update"),
    (lambda step: {"a": step.loss, "b": step.logits.mean() * float("inf")}, "as 'b' -?inf before any update"),
    (lambda step: step.lss, r"fails in terms\(\): AttributeError: .*lss.*test_author_mistakes.py, line \d+"),
]


@pytest.mark.parametrize(("terms", "words"), TERMS)
def test_terms_are_a_dict_of_finite_scalars_whose_sum_has_a_gradient(fit, terms, words):
    with pytest.raises(PluginError, match=words) as caught:
        fit(made(Regularizer, terms=lambda self, step: terms(step)))
    assert str(caught.value).startswith(("regularizer Wrong: terms() returned", "regularizer Wrong fails in terms()"))


def test_a_term_without_gradient_is_allowed_beside_others(fit):
    offset = made(Regularizer, terms=lambda self, step: {"method": step.loss, "offset": step.loss.new_tensor(2.0)})
    plain, shifted = fit(), fit(offset)
    assert shifted.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"] + 2)
    assert shifted.history[-1]["val_ra"] == plain.history[-1]["val_ra"]


def test_a_loss_that_breaks_later_is_a_divergence_and_no_mistake_of_the_author(fit):
    late = made(Regularizer, terms=lambda self, step: {"method": step.loss / (1 if step.progress < 0.5 else 0)})
    with pytest.raises(DivergedError, match="epoch 2, step 1"):
        fit(late)


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (lambda step: None, r"regularizer Wrong fails in terms\(\)"),
        (
            lambda step: step.loss.expand(18),
            r"fails in terms\(\): .*the term 'method' is of shape \(18,\)",
        ),
        (lambda step: step.loss.detach(), r"method AdversarialTraining, regularizer Wrong: their loss has no gradient"),
        (lambda step: step.logits.relu_().exp_().mean(), "their loss has no gradient: RuntimeError.*inplace"),
    ],
)
def test_what_goes_wrong_later_names_the_plugin_too(fit, late, words):
    def terms(self, step):
        return {"method": late(step) if step.progress >= 0.5 else step.loss}

    with pytest.raises(PluginError, match=words):
        fit(made(Regularizer, terms=terms))


def test_logits_that_are_not_finite_from_the_start_are_a_divergence(fit):
    model = network()
    model[1].weight.data.fill_(float("inf"))
    with pytest.raises(DivergedError, match="epoch 1, step 1"):
        fit(model=model)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            lambda labels, k: F.one_hot(labels, k + 1).float(),
            r"a tensor \(18, 4\) of float32; it should return classes",
        ),
        (lambda labels, k: F.one_hot(labels, k), r"a tensor \(18, 3\) of int64; .*\(18, 3\) in floating point"),
        (lambda labels, k: labels[:, None], r"a tensor \(18, 1\) of int64; it should return classes, \(18,\) int64"),
        (lambda labels, k: labels.int(), r"a tensor \(18,\) of int32"),
        (lambda labels, k: labels.tolist(), "a list; it should return"),
        (
            lambda labels, k: 100 * F.one_hot(labels, k).float(),
            "rows that sum to 100; as probabilities each should sum",
        ),
        (lambda labels, k: F.one_hot(labels, k) * float("nan"), "rows that sum to nan"),
        (lambda labels, k: labels + 1, "classes from 1 to 3; there are 3, from 0 on"),
    ],
)
def test_targets_are_classes_or_probabilities(fit, targets, words):
    with pytest.raises(PluginError, match=r"regularizer Wrong: targets\(\) returned " + words):
        fit(made(Regularizer, targets=lambda self, labels, num_classes: targets(labels, num_classes)))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, c, p, t: (ce(m, p, t)[0].expand(18), m(p)), r"as the loss a tensor \(18,\).*mean\(\)"),
        (lambda m, c, p, t: ce(m, p, t)[::-1], r"first a tensor \(18, 3\).*then a tensor \(\).*in this order"),
        (lambda m, c, p, t: ce(m, p, t)[0], r"a tensor \(\) of float32; it should return two tensors"),
        (lambda m, c, p, t: (*ce(m, p, t), 1), "a tuple; it should return two tensors"),
        (lambda m, c, p, t: (0.5, m(p)), "as the loss 0.5; it should return two tensors"),
        (lambda m, c, p, t: (ce(m, p, t)[0], m(torch.cat([c, p]))), r"as the logits a tensor \(36, 3\) .*\(18, 3\)"),
        (lambda m, c, p, t: (ce(m, p, t)[0].detach(), m(p)), "the loss without gradient"),
        (lambda m, c, p, t: (ce(m, p, t)[0], m(p).detach()), "the logits without gradient"),
        (lambda m, c, p, t: (ce(m, p, t)[0] * float("nan"), m(p)), "nan before any update"),
    ],
)  # fmt: skip
def test_a_method_returns_the_loss_and_the_logits_on_the_perturbed_images(fit, loss, words):
    given = {"loss": lambda self, model, clean, perturbed, targets: loss(model, clean, perturbed, targets)}
    with pytest.raises(PluginError, match=r"method Wrong: loss\(\) returned.*" + words):
        fit(made(Method, **given))


def test_a_loss_that_the_model_cannot_learn_from_is_refused(fit):
    apart = network()

    def loss(self, model, clean, perturbed, targets):
        return ce(apart, perturbed, targets)

    with pytest.raises(PluginError, match=r"method Wrong.*reaches no parameter of the model.*call the model"):
        fit(made(Method, loss=loss))


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (None, "returned None. For clean training say 'return CLEAN'"),
        ("pgd", "returned 'pgd'. It should return an attack, such as 'wanted' itself, or CLEAN"),
        (False, "returned False. It should return an attack"),
    ],
)
def test_clean_training_is_said(attack, words):
    method = made(Method, loss=lambda self, model, clean, perturbed, targets: ..., attack=lambda self, wanted: attack)
    with pytest.raises(PluginError, match=r"method Wrong: attack\(\) " + words):
        attack_of(method, ATTACK)


def test_the_attack_that_a_method_names_is_taken():
    assert attack_of(create("methods", "standard"), ATTACK) is CLEAN
    assert attack_of(create("methods", "at"), ATTACK) is ATTACK


# --- what is left behind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.eval(), "left the model in eval mode, .*Call train()"),
        (lambda model: model[2].eval(), "left its module '2' in eval mode"),
        (lambda model: model[1].requires_grad_(False), "left requires_grad of the model's 1.weight False"),
    ],
)
@pytest.mark.parametrize("where", ["loss", "attach", "before_epoch", "after_step", "after_epoch"])
def test_the_model_keeps_its_modes_and_flags(fit, where, change, words):
    def loss(self, model, clean, perturbed, targets):
        found = ce(model, perturbed, targets)
        change(model)
        return found

    def changed(self, model, _):
        change(model)
        return False

    plugin = made(Method, loss=loss) if where == "loss" else made(WeightSmoother, **{where: changed})
    with pytest.raises(PluginError, match=rf"Wrong: {where}\(\) {words}"):
        fit(plugin)


class Keeping(WeightSmoother):
    """Keeps a copy; its subclasses make a mistake with it."""

    _copy: Any = PrivateAttr()

    def attach(self, model, schedule):
        self._copy = copy.deepcopy(model).eval()

    def after_epoch(self, model, epoch):
        return True

    def smoothed(self):
        return self._copy


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda model: copy.deepcopy(model).state_dict(),
            "returned an OrderedDict; it should return a module of its own",
        ),
        (lambda model: model, "returned the model that is trained"),
        (lambda model: nn.Sequential(*model), "returned the model that is trained, or tensors that it shares"),
        (lambda model: copy.deepcopy(model), "returned a model in train mode. Call eval()"),
        (lambda model: AveragedModel(model).eval(), r"other names or shapes .* return its .module"),
        (lambda model: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), "other names or shapes"),
    ],
)
def test_the_average_is_a_module_of_its_own_in_eval_mode(fit, make, words):
    class Wrong(Keeping):
        def attach(self, model, schedule):
            self._copy = make(model)

    with pytest.raises(PluginError, match=r"smoother Wrong: smoothed\(\) .*" + words):
        fit(Wrong())


@pytest.mark.parametrize("moved", [None, 1, "yes"])
def test_a_smoother_says_whether_its_average_moved(fit, moved):
    with pytest.raises(PluginError, match=r"smoother Wrong: after_epoch\(\) returned .*; it should return True where"):
        fit(made(Keeping, after_epoch=lambda self, model, epoch: moved))


# --- classes


class Helpful(Regularizer):
    """Everything that is allowed."""

    weight: float = Field(default=1.0, description="of the loss")

    @field_validator("weight")
    @classmethod
    def not_negative(cls, weight):
        if weight < 0:
            raise ValueError("it is below 0")
        return weight

    @classmethod
    def heavy(cls):
        return cls(weight=10)

    def terms(self, step, scale=1.0):
        return {"method": self._scaled(step.loss) * scale}

    def _scaled(self, loss):
        return self.weight * loss


def test_helpers_validators_and_more_parameters_are_allowed():
    check_plugin(Helpful())
    check_plugin(Helpful.heavy())
    check_plugin(type("Heir", (Helpful,), {"__module__": __name__})())
    check_plugin(made(Regularizer, terms=lambda self, *given: ...))


def unbased(self, **options):
    """Calls nobody's ``__init__``."""


@pytest.mark.parametrize(
    ("base", "methods", "words"),
    [
        (Regularizer, {}, "overrides no method of at_smooth.Regularizer, so it changes nothing.*terms"),
        (Regularizer, {"term": lambda self, step: {}}, "has a method term, .*did you mean 'terms'.*helper.*: _term"),
        (Regularizer, {"setup": lambda self, t: 0, "margin": lambda self: 0}, "a method margin.*: _margin"),
        (WeightSmoother, {"after_epochs": lambda self, model, epoch: True}, "did you mean 'after_epoch'"),
        (Method, {"loss": lambda self, model, clean, perturbed, targets: 0, "attacks": lambda self, w: w}, "'attack'"),
        (Evaluator, {"perturb": lambda self, task, stage, images, labels: 0, "stage": lambda self, t: 0}, "stages"),
        (Regularizer, {"terms": lambda self, logits, labels: {}}, r"terms\(self, logits, labels\), .* as terms\(s"),
        (Regularizer, {"terms": lambda self: {}}, r"terms\(self\), and is called as terms\(step\)"),
        (Regularizer, {"targets": lambda self, labels: 0}, r"called as targets\(labels, num_classes\)"),
        (Regularizer, {"targets": lambda self, num_classes, labels: 0}, "these parameters, in this order"),
        (Method, {"loss": lambda self, model, clean, perturbed: 0}, r"as loss\(model, clean, perturbed, targets\)"),
        (Method, {"loss": lambda self, model, perturbed, clean, targets: 0}, "in this order"),
        (WeightSmoother, {"after_step": lambda self, model: 0}, r"called as after_step\(model, step\)"),
        (Dataset, {"load": lambda self: 0}, r"called as load\(data_dir\)"),
        (Architecture, {"build": lambda self, shape: 0}, r"called as build\(shape, num_classes\)"),
        (Regularizer, {"terms": lambda self, step: {}, "__init__": unbased}, r"does not call super\(\).__init__"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_work_is_refused_before_anything_runs(base, methods, words):
    with pytest.raises(PluginError, match=words) as caught:
        check_plugin(made(base, **methods))
    assert " Wrong" in str(caught.value)


def test_a_plugin_by_name_is_checked_too(tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text(
        "from at_smooth import Regularizer\nclass Typo(Regularizer):\n    def term(self, step): return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match="regularizer Typo has a method term"):
        create("regularizers", "mistaken:Typo")


def test_an_option_that_was_not_given_is_asked_for():
    class Needy(Helpful):
        strength: float

    with pytest.raises(OptionError, match="strength: it has no default, so give it a value"):
        Needy.build_from({}, "regularizer needy")


def test_a_public_attribute_is_refused_with_what_to_declare(fit):
    def setup(self, teachers):
        self.teacher = nn.Identity()

    with pytest.raises(PluginError, match=r"fails in setup\(\): it sets 'teacher'.*_teacher: Any = PrivateAttr"):
        fit(made(Regularizer, setup=setup))


# --- data sets, networks and analyses


def test_an_analysis_gives_a_study():
    with pytest.raises(PluginError, match=r"analysis Wrong: study\(\) returned \{\}; .*at_smooth.Study"):
        studied(made(Analysis, study=lambda self, runs: {}), [])
    with pytest.raises(PluginError, match=r"analysis Wrong fails in study\(\): IndexError.*test_author_mistakes.py"):
        studied(made(Analysis, study=lambda self, runs: runs[0]), [])


@pytest.mark.parametrize("given", [None, (torch.rand(4, 1, 2, 2), torch.arange(4))])
def test_a_data_set_loads_images(given):
    with pytest.raises(PluginError, match=r"data set Wrong: load\(\) returned (None|a tuple); .*at_smooth.Images"):
        loaded(made(Dataset, load=lambda self, data_dir: given), None)


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (None, "returned None; it should return a network, a torch.nn.Module"),
        (nn.Linear, "returned the class Linear; .*Call the class"),
        (nn.Linear(2, 2).requires_grad_(False), "returned a network in which no parameter learns"),
        (nn.Flatten(), "returned a network in which no parameter learns"),
    ],
)
def test_an_architecture_builds_a_network_that_learns(built, words):
    wrong = made(Architecture, build=lambda self, shape, num_classes: built)
    with pytest.raises(PluginError, match=r"model Wrong: build\(\) " + words):
        learning_network_of(wrong, wrong.build((1, 2, 2), 2))


class Sharp(nn.Module):
    """No gradient reaches its input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head((images > 0.5).float().flatten(1))


def test_a_model_through_which_no_gradient_passes_is_refused_where_it_is_attacked(fit, toy_data):
    with pytest.raises(OptionError, match=r"no gradient reaches the images, so they cannot be attacked.*comparison"):
        fit(model=Sharp())
    engine = Engine(
        Sharp(), toy_data(), method=create("methods", "standard"), attack=ATTACK,
        settings=Settings(epochs=1, eval_steps=0, test_every=0), runtime=Runtime.choose("cpu"),
    )  # fmt: skip
    assert engine.fit()


def test_a_frozen_model_is_refused(fit):
    with pytest.raises(InputError, match="no parameter that learns"):
        fit(model=network().requires_grad_(False))


# --- memory


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, r"state\(\) returned NoneType; it should return a dict"),
        ([1], r"state\(\) returned list"),
        ({"seen": np.ones(2)}, r"state\(\)\['seen'\] is a ndarray; give torch.as_tensor"),
        ({"seen": {"deep": [nn.Linear(2, 2)]}}, r"state\(\)\['seen'\]\['deep'\]\[0\] is a Linear; give its state_dict"),
        ({"seen": {1, 2}}, r"is a set; give list"),
        ({"seen": torch.ones(2).to_sparse()}, r"state\(\)\['seen'\] is a sparse, .* tensor; give a dense one"),
        ({"seen": torch.ones(2, requires_grad=True) * 2}, "a tensor with a gradient's history; give its detach"),
        ({"n": 1}, r"it has state\(\) and no restore\(state\).*without 'n'"),
    ],
)
def test_a_state_is_what_a_checkpoint_can_hold_and_can_be_put_back(fit, state, words):
    with pytest.raises(PluginError, match=words):
        fit(made(Regularizer, state=lambda self: state))


class Counting(Regularizer):
    """Counts its calls, and has a state in its subclasses."""

    _n: int = PrivateAttr(default=0)

    def terms(self, step):
        self._n += 1
        return {"method": step.loss}


class Forgetful(Counting):
    def state(self):
        return {"n": self._n}

    def restore(self, state):
        pass


class Misnamed(Forgetful):
    def restore(self, state):
        self._n = state["count"]


class Sound(Forgetful):
    def restore(self, state):
        self._n = state["n"]


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Forgetful, r"regularizer Forgetful: restore\(\) does not take up .* another 'n'"),
        (Misnamed, r"regularizer Misnamed fails in restore\(\): KeyError: 'count'"),
    ],
)
def test_a_state_is_read_back_in_the_first_epoch(fit, cls, words):
    with pytest.raises(PluginError, match=words):
        fit(cls())


def test_reading_back_leaves_the_plugin_alone(fit):
    assert fit(Sound(), epochs=3).regularizer._n == 6


class Cached(Counting):
    def state(self):
        return {}


class Training(Counting):
    """Steps an optimiser of its own, and remembers in many ways."""

    _net: Any = PrivateAttr(default_factory=lambda: nn.Linear(3, 1))
    _same: Any = PrivateAttr(default_factory=lambda: {"teacher": nn.Linear(3, 1), "alpha": [0.5, torch.ones(3)]})
    _optimizer: Any = PrivateAttr(default=None)
    _seen: Any = PrivateAttr(default_factory=lambda: [torch.zeros(3)])

    def model_post_init(self, context):
        super().model_post_init(context)
        self._optimizer = torch.optim.SGD(self._net.parameters(), 0.1, momentum=0.9)

    def terms(self, step):
        self._seen[0] += 1
        self._optimizer.zero_grad()
        self._net(step.logits.detach()).mean().backward()
        self._optimizer.step()
        return {"method": step.loss}


@pytest.mark.parametrize(
    ("cls", "named"), [(Counting, "_n"), (Training, "_net, _optimizer, _seen"), (Cached, None), (Sound, None)]
)
def test_memory_without_a_state_is_said_once(fit, cls, named, recwarn):
    fit(cls(), epochs=3)
    told = [str(warning.message) for warning in recwarn if issubclass(warning.category, AtSmoothWarning)]
    if named is None:
        assert told == []
    else:
        assert len(told) == 1
        assert told[0].startswith(
            f"regularizer {cls.__name__}: {named} changed in the first epoch, and there is no state"
        )


def test_teachers_and_what_setup_makes_are_no_memory(fit, recwarn):
    fit(create("regularizers", "kd-std-adv"))
    fit(create("smoothers", "ema"))
    assert [warning for warning in recwarn if issubclass(warning.category, AtSmoothWarning)] == []


# --- the command

MISTAKEN = """
from pydantic import PrivateAttr
from at_smooth import Regularizer

class Vector(Regularizer):
    def terms(self, step):
        return {"method": step.loss.expand(len(step.labels))}

class Broken(Regularizer):
    def terms(self, step):
        return {"method": step.loss / len(step.nobody)}

class Late(Regularizer):
    def terms(self, step):
        return {"method": step.loss if step.progress < 0.5 else None}

class Counting(Regularizer):
    _n: int = PrivateAttr(default=0)

    def terms(self, step):
        self._n += 1
        return {"method": step.loss}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains with a regularizer from a file, in this process."""
    (tmp_path / "mistaken_plugins.py").write_text(MISTAKEN)
    monkeypatch.chdir(tmp_path)
    small = ["-D", "pool=100", "--epochs", "2", "--device", "cpu", "-A", "steps=1", "--set", "eval_steps=1"]
    return lambda name: CliRunner().invoke(
        cli, ["train", "--regularizer", f"mistaken_plugins:{name}", "--out", "run", *small]
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Vector", "regularizer Vector: terms() returned as 'method' a tensor (60,)"),
        ("Broken", "mistaken_plugins.py, line 11"),
    ],
)
def test_the_command_says_it_in_one_line_and_leaves_no_run(run, tmp_path, name, words):
    result = run(name)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_shows_later_leaves_what_was_saved(run, tmp_path):
    result = run("Late")
    assert result.exit_code == 2
    assert "regularizer Late" in result.stderr
    assert "The last good checkpoint stands: run/checkpoints/last.pt, epoch 1." in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


def test_the_command_notes_memory_that_is_not_saved(run):
    result = run("Counting")
    assert result.exit_code == 0
    assert result.stderr.count("note: regularizer Counting: _n changed in the first epoch") == 1
