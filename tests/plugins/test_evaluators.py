import copy
import importlib
import inspect
import itertools
import random
import shutil
import statistics
import sys
import types

import numpy as np
import pyautoattack
import pytest
import torch
import torchattacks
from torch import nn

from at_smooth import (
    CheckpointError,
    InputError,
    OptionError,
    Part,
    PluginError,
    Runtime,
    Threat,
    create,
    evaluate,
    load_data,
    load_model,
)
from at_smooth.attacks import AttackSpec
from at_smooth.journal import Journal
from at_smooth.registry import entries
from at_smooth.runtime import fenced_randomness, seed_global

CPU = Runtime(torch.device("cpu"))
NAMES = [entry.name for entry in entries("evaluators") if entry.distribution == "at-smooth"]
LIBRARY = ["torchattacks:PGD", "torchattacks:APGD"]


def run(model, part, threat, name, *, batch_size=250, seed=0, **options):
    """The outcome of one evaluator."""
    evaluators = {name: create("evaluators", name, options)}
    return evaluate(model, part, evaluators, threat, batch_size=batch_size, seed=seed, runtime=CPU).outcomes[name]


@pytest.fixture(scope="module")
def digits(smoothed_run):
    """A tiny trained model, 40 images of which it gets 34 right, and threats that it half withstands."""
    model, test = load_model(smoothed_run.path), load_data(smoothed_run.path).test
    broken = wrong(model, test.images.float() / 255, test.labels)
    chosen = torch.cat([(~broken).nonzero().flatten()[:34], broken.nonzero().flatten()[:6]])
    chosen = chosen[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    threats = {"Linf": Threat("Linf", 0.03), "L2": Threat("L2", 0.15)}
    return types.SimpleNamespace(model=model, part=Part(test.images[chosen], test.labels[chosen]), threats=threats)


def floats(part):
    return part.images.float() / 255 if part.images.dtype == torch.uint8 else part.images


def wrong(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(1) != labels


# All of them


class Net(nn.Module):
    """A network with all that an attack could disturb: BatchNorm, dropout, a counter, a frozen part."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.last = nn.Linear(64, 3)

    def forward(self, images):
        return self.last(self.drop(self.norm(self.first(images)).relu()).flatten(1))


@pytest.fixture
def net(toy_images):
    """In training mode with one module in eval mode; some parameters want no gradient, some have one."""
    torch.manual_seed(0)
    model, images = Net(), toy_images()
    model(images.train).square().mean().backward()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.last.bias.grad = None
    return model


def everything_global():
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        sys.gettrace(),
    )


def everything_of(model):
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: None if each.grad is None else each.grad.clone()
                      for name, each in model.named_parameters()},
        "wanted": {name: each.requires_grad for name, each in model.named_parameters()},
        "identities": {name: (id(each), each.data_ptr()) for name, each in model.named_parameters()},
        "modes": {name: each.training for name, each in model.named_modules()},
        "hooks": {name: (len(each._forward_hooks), len(each._backward_hooks)) for name, each in model.named_modules()},
    }  # fmt: skip


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name])
        else:
            assert value == other[name]


FEW = {
    "autoattack": {"attacks": ["apgd-ce", "apgd-dlr", "fab-t", "square"]},
    "cw": {"iterations": 5},
    "torchattacks:APGD": {"steps": 5},
}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", NAMES + LIBRARY)
def test_an_evaluation_disturbs_nothing(name, norm, net, toy_images, plain_run):
    if name == "torchattacks:PGD" and norm == "L2":
        name = "torchattacks:PGDL2"
    options = FEW.get(name, {})
    model, images = net, toy_images()
    part = Part(images.test[:6], images.test_labels[:6])
    if name == "transfer":
        options = {"source": str(plain_run.path), "steps": 2}
        torch.manual_seed(0)
        model, test = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), load_data(plain_run.path).test
        model[1].eval()
        model[2].bias.requires_grad_(False)
        part = Part(test.images[:6], test.labels[:6])
    evaluators = {"it": create("evaluators", name, options)}
    given = Part(part.images.clone(), part.labels.clone())

    def tracer(*_):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        world, own = everything_global(), everything_of(model)
        evaluate(model, part, evaluators, Threat(norm, 0.3), batch_size=4, seed=3, runtime=CPU)
        after = everything_global()
    finally:
        sys.settrace(before)
    assert after == world
    assert_equal(everything_of(model), own)
    assert torch.equal(part.images, given.images)
    assert torch.equal(part.labels, given.labels)


@pytest.mark.parametrize("name", NAMES + LIBRARY)
def test_a_failed_evaluation_disturbs_nothing_either(name, net, toy_images):
    if name == "transfer":
        pytest.skip("attacks another model")
    images, calls = toy_images(), []

    class Failing(Net):
        def forward(self, images):
            calls.append(1)
            if len(calls) > 3:  # those before the attack begins
                raise ValueError("enough")
            return super().forward(images)

    model = Failing()
    model.load_state_dict(net.state_dict())
    world, own = everything_global(), everything_of(model)
    with pytest.raises((PluginError, ValueError), match="enough"):
        run(model, Part(images.test, images.test_labels), Threat("Linf", 0.1), name, batch_size=2)
    assert everything_global() == world
    assert_equal(everything_of(model), own)


@pytest.mark.parametrize("name", [*NAMES, *LIBRARY, "torchattacks:FAB", "torchattacks:Square", "torchattacks:SPSA"])
def test_the_same_seed_gives_the_same(name, digits, plain_run):
    few = {"torchattacks:Square": {"n_queries": 5}, "torchattacks:FAB": {"steps": 3}, "torchattacks:SPSA": {},
           "transfer": {"source": str(plain_run.path)}, "autoattack": {"attacks": "apgd-ce"}}  # fmt: skip
    options = few.get(name, FEW.get(name, {}))
    part = Part(*(each[:8] for each in digits.part))
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    one = run(digits.model, part, digits.threats["Linf"], name, seed=5, **options)
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    other = run(digits.model, part, digits.threats["Linf"], name, seed=5, **options)
    assert torch.equal(one.distances, other.distances)
    assert (one.broken_by.tolist(), one.notes, one.figures) == (other.broken_by.tolist(), other.notes, other.figures)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("clean", "cw", "transfer")])
def test_eps_0_is_refused(name, digits):
    with pytest.raises(OptionError, match="eps is 0"):
        run(digits.model, digits.part, Threat("Linf", 0), name)


def test_what_needs_no_radius_takes_eps_0(digits):
    part = Part(*(each[:4] for each in digits.part))
    clean = run(digits.model, part, Threat("Linf", 0), "clean")
    assert (clean.broken_by == 0).tolist() == wrong(digits.model, floats(part), part.labels).tolist()
    run(digits.model, part, Threat("L2", 0), "cw", iterations=2)


# Closed forms


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fgsm", {}),
        ("pgd", {}),
        ("pgd", {"targeted": True}),
        ("pgd", {"random_start": False, "restarts": 2}),
        ("autoattack", {"attacks": ["apgd-ce"]}),
        ("autoattack", {"attacks": ["fab"]}),
    ],
)
def test_gradient_attacks_break_exactly_what_can_be_broken(linear_task, name, options, norm):
    task = linear_task()
    outcome = run(task.model, task.part, task.threats[norm], name, batch_size=17, **options)
    assert 0.2 < task.standing[norm].float().mean() < 0.8
    assert torch.equal(outcome.standing, task.standing[norm])
    assert outcome.notes == []


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_autoattack_breaks_exactly_what_can_be_broken_among_four_classes(linear_task, norm):
    task = linear_task(classes=4, n=24)
    outcome = run(task.model, task.part, task.threats[norm], "autoattack", attacks=["apgd-ce", "apgd-t", "fab-t"])
    assert torch.equal(outcome.standing, task.standing[norm])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 5])
def test_noise_breaks_nothing_that_cannot_be_broken(linear_task, classes, norm):
    task = linear_task(classes=classes)
    outcome = run(task.model, task.part, task.threats[norm], "noise", draws=50)
    assert not (task.standing[norm] & ~outcome.standing).any()
    assert (~outcome.standing).sum() > 5
    lengths = outcome.distances[~outcome.standing]
    expected = task.threats[norm].eps * (12**0.5 if norm == "Linf" else 1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, expected))
    assert outcome.notes == []


def test_noise_stays_among_the_images(linear_task):
    task = linear_task()
    assert run(task.model, task.part, Threat("Linf", 0.9), "noise").notes == []
    assert run(task.model, task.part, Threat("L2", 3.4), "noise").notes == []


def test_clean_is_the_accuracy(linear_task):
    task = linear_task(classes=3)
    outcome = run(task.model, task.part, Threat("Linf", 0), "clean", batch_size=7)
    assert torch.equal(outcome.standing, task.right)
    assert (outcome.distances[~task.right] == 0).all()


def test_uint8_images_are_divided_by_255(digits):
    as_floats = Part(floats(digits.part), digits.part.labels)
    for name in ("clean", "pgd"):
        one, other = (run(digits.model, part, digits.threats["Linf"], name) for part in (digits.part, as_floats))
        assert torch.equal(one.broken_by, other.broken_by)


# PGD and FGSM


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_is_the_librarys_attack(digits, norm, random_start):
    threat = digits.threats[norm]
    step = threat.eps / 3
    outcome = run(digits.model, digits.part, threat, "pgd", seed=4, steps=5, step_size=step, random_start=random_start)
    library = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[norm]
    attack = library(digits.model, threat.eps, step, 5, random_start)
    images, labels = floats(digits.part), digits.part.labels
    with fenced_randomness(4, "restart 1, batch 0"):
        perturbed = attack(images, labels)
    digits.model.eval()
    broken = wrong(digits.model, perturbed, labels)
    assert torch.equal(~outcome.standing, broken)
    assert 0 < broken.sum() < 40
    expected = (perturbed - images).flatten(1).norm(dim=1)[broken]
    torch.testing.assert_close(outcome.distances[broken], expected)


@pytest.mark.parametrize(("norm", "share"), [("Linf", 1 / 4), ("L2", 15 / 128)])
def test_pgds_defaults_are_the_papers_test_attack(digits, norm, share):
    evaluator = create("evaluators", "pgd")
    assert (evaluator.steps, evaluator.restarts, evaluator.targeted, evaluator.random_start) == (20, 1, False, True)
    threat = digits.threats[norm]
    usual = run(digits.model, digits.part, threat, "pgd")
    said = run(digits.model, digits.part, threat, "pgd", step_size=threat.eps * share)
    other = run(digits.model, digits.part, threat, "pgd", step_size=threat.eps * share * 1.5)
    assert torch.equal(usual.distances, said.distances)
    assert not torch.equal(usual.distances, other.distances)


def test_fgsm_is_one_step_from_the_image(digits):
    images, labels = floats(digits.part).requires_grad_(), digits.part.labels
    [gradient] = torch.autograd.grad(nn.functional.cross_entropy(digits.model(images), labels), images)
    perturbed = (images.detach() + 0.03 * gradient.sign()).clamp(0, 1)
    outcome = run(digits.model, digits.part, Threat("Linf", 0.03), "fgsm")
    assert torch.equal(~outcome.standing, wrong(digits.model, perturbed, labels))


@pytest.mark.parametrize("targeted", [True, False])
def test_restarts_only_break_more(digits, targeted):
    options = {"steps": 2, "targeted": targeted, "target_classes": 2}
    outcomes = [run(digits.model, digits.part, digits.threats["Linf"], "pgd", restarts=restarts, **options)
                for restarts in (1, 2, 6)]  # fmt: skip
    for fewer, more in itertools.pairwise(outcomes):
        assert not (more.standing & ~fewer.standing).any()
        assert more.stages[: len(fewer.stages)] == fewer.stages
        assert list(more.broke.values())[: len(fewer.stages)] == list(fewer.broke.values())
    assert len(outcomes[-1].stages) == 6 * (2 if targeted else 1)


class Decoy(nn.Module):
    """Three classes, two pixels: the first one leads towards class 1, ever slower, the second one to class 2.

    Class 0 is right; class 1 is the likelier wrong one and is never reached; class 2 is, when it is aimed at.
    """

    def forward(self, images):
        first, second = images.flatten(1).T
        zero = torch.zeros_like(first)
        return torch.stack([zero, -0.1 - 0.01 * (1 - first), -1 + 10 * (second - 0.5) - 0.001 * first], 1)


def test_targeted_pgd_aims_at_the_likeliest_classes_in_turn():
    part = Part(torch.full((3, 1, 1, 2), 0.5), torch.zeros(3, dtype=torch.long))
    options = {"targeted": True, "steps": 10, "random_start": False}
    first = run(Decoy(), part, Threat("Linf", 0.2), "pgd", target_classes=1, **options)
    both = run(Decoy(), part, Threat("Linf", 0.2), "pgd", target_classes=2, **options)
    assert first.broke == {"restart 1, target 1": 0}
    assert both.broke == {"restart 1, target 1": 0, "restart 1, target 2": 3}


def test_targets_end_with_the_classes(linear_task):
    task = linear_task(classes=3)
    outcome = run(task.model, task.part, task.threats["Linf"], "pgd", targeted=True, steps=1)
    assert outcome.stages == ["restart 1, target 1", "restart 1, target 2"]


def test_targeted_pgd_spares_images_that_a_model_hands_on_as_its_logits():
    images = torch.tensor([[0.6, 0.5], [0.9, 0.2]]).view(2, 2, 1, 1)
    part = Part(images, torch.zeros(2, dtype=torch.long))
    outcome = run(nn.Flatten(), part, Threat("Linf", 0.2), "pgd", targeted=True)
    assert outcome.standing.tolist() == [False, True]
    assert outcome.notes == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pgd", {"steps": 0}, "evaluator pgd: steps: .*greater than or equal to 1"),
        ("pgd", {"stepz": 3}, "evaluator pgd: stepz: there is no such option. Options: steps, step_size"),
        ("pgd", {"step_size": "junk"}, "step_size.*neither a number nor a fraction"),
        ("pgd", {"step_size": 0}, "step_size"),
        ("pgd", {"restarts": 0}, "restarts"),
        ("fgsm", {"steps": 2}, "evaluator fgsm: steps: there is no such option"),
        ("noise", {"draws": 0}, "evaluator noise: draws"),
        ("clean", {"draws": 0}, "evaluator clean: draws.*Options: none"),
        ("cw", {"c": 0}, "evaluator cw: c: .*greater than 0"),
        ("cw", {"iterations": 0}, "evaluator cw: iterations"),
        ("autoattack", {"version": "standart"}, "evaluator autoattack: version.*'standard', 'plus'"),
        ("autoattack", {"attacks": ["apgd"]}, "evaluator autoattack: attacks"),
        ("autoattack", {"seed": -1}, "evaluator autoattack: seed"),
        ("transfer", {}, "evaluator transfer: source"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(name, options, words):
    with pytest.raises(OptionError, match=words):
        create("evaluators", name, options)


# AutoAttack


def direct_autoattack(model, part, threat, *, batch_size, seed, attacks=None, version="standard", targets=9):
    """Which examples stand, by the library called directly."""
    with fenced_randomness(99, "anything"):
        own = {"version": "custom", "attacks": attacks} if attacks else {"version": version}
        library = pyautoattack.AutoAttack(copy.deepcopy(model), norm=threat.norm, eps=threat.eps, seed=seed, **own)
        if attacks:
            library.apgd.n_restarts = library.fab.n_restarts = 1
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
        library.verbose = False
        perturbed, _ = library.run_standard_evaluation(floats(part), part.labels, batch_size=batch_size)
        return ~wrong(model, perturbed, part.labels)


def assert_is_the_library(digits, norm, n, batch_size):
    part = Part(*(each[:n] for each in digits.part))
    outcome = run(digits.model, part, digits.threats[norm], "autoattack", batch_size=batch_size, seed=7)
    assert outcome.stages == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    expected = direct_autoattack(digits.model, part, digits.threats[norm], batch_size=batch_size, seed=7)
    assert torch.equal(outcome.standing, expected)
    assert 0 < outcome.standing.sum() < n
    assert outcome.figures == {"library": "pyautoattack 0.2.0", "version": "standard", "seed": 7}


@pytest.mark.slow
def test_autoattack_is_the_library_called_directly_example_by_example(digits):
    assert_is_the_library(digits, "Linf", 4, 4)


def test_so_it_is_over_several_batches(digits, monkeypatch):
    """Square makes fewer queries here, in either."""
    original = pyautoattack.AutoAttack._set_version

    def briefer(self, version):
        original(self, version)
        self.square.n_queries = 50

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", briefer)
    assert_is_the_library(digits, "L2", 8, 5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_so_it_is_over_several_batches_in_full(digits, norm):
    assert_is_the_library(digits, norm, 40, 9)


@pytest.mark.parametrize("attack", [
    "apgd-ce", "apgd-dlr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("apgd-t", "fab-t", "square")),
])  # fmt: skip
def test_each_attack_is_the_librarys(digits, attack):
    threat, part = Threat("Linf", 0.025), Part(*(each[:12] for each in digits.part))
    outcome = run(digits.model, part, threat, "autoattack", batch_size=7, attacks=attack, seed=1)
    expected = direct_autoattack(digits.model, part, threat, batch_size=7, seed=1, attacks=[attack])
    assert outcome.stages == ["clean", attack]
    assert torch.equal(outcome.standing, expected)


@pytest.mark.slow
def test_autoattacks_version_for_randomised_defences_is_the_librarys(digits):
    part = Part(*(each[:4] for each in digits.part))
    outcome = run(digits.model, part, digits.threats["Linf"], "autoattack", version="rand", seed=2)
    assert outcome.stages == ["clean", "apgd-ce", "apgd-dlr"]
    expected = direct_autoattack(digits.model, part, digits.threats["Linf"], batch_size=250, seed=2, version="rand")
    assert torch.equal(outcome.standing, expected)


def test_autoattacks_own_seed_has_the_last_word(digits):
    def lengths(seed, **options):
        return run(digits.model, digits.part, Threat("L2", 0.25), "autoattack", attacks="apgd-ce", seed=seed, **options)

    own = create("evaluators", "autoattack", {"attacks": "apgd-ce", "seed": 1})
    own = evaluate(digits.model, digits.part, {"aa": own}, Threat("L2", 0.25), runtime=CPU, seed=0).outcomes["aa"]
    assert torch.equal(own.distances, lengths(1).distances)
    assert not torch.equal(own.distances, lengths(0).distances)
    assert own.figures["seed"] == 1


@pytest.mark.parametrize(
    ("classes", "ran", "instead"),
    [
        (2, ["clean", "apgd-ce", "apgd-ce (5 restarts)", "fab-t", "square"], "apgd-ce (5 restarts)"),
        (3, ["clean", "apgd-ce", "apgd-dlr", "fab-t", "square"], "apgd-dlr"),
        (4, ["clean", "apgd-ce", "apgd-t", "fab-t", "square"], None),
    ],
)
def test_few_classes_are_attacked_with_what_can_run_and_it_is_said(linear_task, monkeypatch, classes, ran, instead):
    monkeypatch.setattr(pyautoattack.square.SquareAttack, "perturb", lambda self, images, labels: images)  # is slow
    task = linear_task(classes=classes, n=12)
    outcome = run(task.model, task.part, task.threats["Linf"], "autoattack")
    assert outcome.stages == ran
    assert torch.equal(outcome.standing, task.standing["Linf"])
    assert sum(outcome.broke.values()) == 12 - int(task.standing["Linf"].sum())
    said = [f"apgd-t needs 4 classes and there are {classes}; {instead} ran instead"]
    assert outcome.notes[:1] == (said if instead else [])


def test_attacks_are_named_once_where_one_stands_for_two(linear_task):
    task = linear_task(n=6)
    outcome = run(task.model, task.part, task.threats["Linf"], "autoattack", attacks=["apgd-dlr", "apgd-t"])
    assert outcome.stages == ["clean", "apgd-ce (5 restarts)"]
    assert len(outcome.notes) == 2


class Randomised(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        logits = self.inner(images)
        return logits + 0.1 * torch.randn_like(logits)


class Masked(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner((images * 8).round() / 8)


class Dynamic(nn.Module):
    """Takes gradients of its own while it predicts."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        with torch.enable_grad():
            probe = images.detach().clone().requires_grad_()
            torch.autograd.grad(self.inner(probe).sum(), probe)
        return self.inner(images)


@pytest.mark.parametrize(
    ("defence", "attack", "words"),
    [(Randomised, "apgd-ce", "randomized defense"), (Masked, "apgd-dlr", "zero gradient")],
)
def test_the_librarys_warnings_are_passed_on(linear_task, defence, attack, words, capsys, caplog):
    task = linear_task(classes=4, n=10)
    with fenced_randomness(0, "x"):
        outcome = run(defence(task.model), task.part, task.threats["Linf"], "autoattack", attacks=attack)
    assert any(words in note for note in outcome.notes)
    assert len(set(outcome.notes)) == len(outcome.notes)
    assert capsys.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_square_that_breaks_more_than_the_gradients_is_passed_on(linear_task):
    task = linear_task(classes=4, n=20)
    outcome = run(Masked(task.model), task.part, Threat("Linf", 0.2), "autoattack", attacks=["apgd-ce", "square"])
    assert outcome.broke["square"] > 0
    assert any("Square Attack has decreased" in note for note in outcome.notes)


def test_a_warning_is_about_the_model_that_earned_it(linear_task):
    task = linear_task(n=4)
    options = {"attacks": ["apgd-ce"]}
    defended = run(Dynamic(task.model), task.part, task.threats["Linf"], "autoattack", **options)
    assert any("dynamic defense" in note for note in defended.notes)
    assert run(task.model, task.part, task.threats["Linf"], "autoattack", **options).notes == []


def without(monkeypatch, *names):
    """As if packages were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)

    def absent(name, *rest):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name, *rest)

    monkeypatch.setattr("at_smooth_plugins.evaluators.autoattack.import_module", absent)


def test_the_package_autoattack_will_do(linear_task, monkeypatch):
    """The official repository's package: other names of arguments, another logger, a bare tensor."""
    calls = []

    class AutoAttack:
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(),
                     version="standard", is_tf_model=False, device="cuda", log_path=None):  # fmt: skip
            assert verbose is False
            self.model, self.eps, self.seed, self.verbose = model, eps, seed, verbose
            self.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]
            self.apgd, self.apgd_targeted, self.fab = (types.SimpleNamespace() for _ in range(3))

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False):
            calls.append((tuple(self.attacks_to_run), len(x_orig), bs, self.seed))
            self.logger.log("using standard version")
            self.logger.log("Warning: it seems to be odd")
            sign = (self.model[1].weight[1 - y_orig] - self.model[1].weight[y_orig]).sign().view(x_orig.shape)
            return (x_orig + self.eps * sign).clamp(0, 1)

    fake = types.ModuleType("autoattack")
    fake.AutoAttack, AutoAttack.__module__ = AutoAttack, "autoattack.autoattack"
    checks = types.ModuleType("autoattack.checks")
    checks.check_square_sr = lambda acc_dict, alpha=0.002, logger=None: logger.log("Warning: and Square too")
    fake.checks = checks
    without(monkeypatch, "pyautoattack")
    monkeypatch.setitem(sys.modules, "autoattack", fake)
    monkeypatch.setitem(sys.modules, "autoattack.checks", checks)
    task = linear_task()
    outcome = run(task.model, task.part, task.threats["Linf"], "autoattack", batch_size=30, seed=6)
    assert torch.equal(outcome.standing, task.standing["Linf"])
    assert outcome.broke["clean"] == int((~task.right).sum())
    assert "it seems to be odd" in outcome.notes
    assert "and Square too" in outcome.notes
    assert not any("using standard" in note for note in outcome.notes)
    assert calls[0] == (("apgd-ce",), 30, 30, 6)
    assert outcome.figures["library"].startswith("autoattack")


def test_without_either_package_it_says_what_to_install(linear_task, monkeypatch):
    without(monkeypatch, "pyautoattack", "autoattack")
    task = linear_task()
    with pytest.raises(PluginError, match="pip install pyautoattack"):
        run(task.model, task.part, task.threats["Linf"], "autoattack")


# Carlini and Wagner


def carlini_wagner(model, part, classes, **options):
    """AdverTorch's attack called directly; what it returns for each image."""
    create("evaluators", "cw")
    from at_smooth_plugins.evaluators.cw import _mend_advertorch

    _mend_advertorch()
    from advertorch.attacks import CarliniWagnerL2Attack

    model = copy.deepcopy(model).requires_grad_(False)
    return CarliniWagnerL2Attack(model, classes, **options).perturb(floats(part), part.labels)


PAPERS = {"binary_search_steps": 1, "initial_const": 0.1, "max_iterations": 100, "learning_rate": 0.01}


def test_cw_is_the_librarys_attack_in_the_papers_setting(digits):
    outcome = run(digits.model, digits.part, digits.threats["Linf"], "cw")
    perturbed = carlini_wagner(digits.model, digits.part, 10, abort_early=False, **PAPERS)
    images, labels = floats(digits.part), digits.part.labels
    already = wrong(digits.model, images, labels)
    assert torch.equal(outcome.broken_by == 0, already)
    assert torch.equal(~outcome.standing, already | wrong(digits.model, perturbed, labels))
    lengths = (perturbed - images).flatten(1).norm(dim=1)
    broken = outcome.broken_by == 1
    assert 3 < broken.sum() < 34
    torch.testing.assert_close(outcome.distances[broken], lengths[broken], rtol=1e-3, atol=1e-4)


def test_cws_figures_are_what_they_say(digits):
    outcome = run(digits.model, digits.part, digits.threats["Linf"], "cw", c=1.0, budgets=[0.1, "32/255", 0.2, 10])
    lengths = [length for length, stage in zip(outcome.distances.tolist(), outcome.broken_by.tolist(), strict=True)
               if stage == 1]  # fmt: skip
    already = int((outcome.broken_by == 0).sum())
    figures = outcome.figures
    assert already
    assert len(lengths) > 10
    assert figures["success_rate"] == pytest.approx(100 * len(lengths) / (40 - already))
    assert figures["median_l2"] == pytest.approx(statistics.median(lengths), rel=1e-6)
    assert list(figures["accuracy_within_l2"]) == ["0.1", "32/255", "0.2", "10.0"]
    for budget, accuracy in zip((0.1, 32 / 255, 0.2, 10), figures["accuracy_within_l2"].values(), strict=True):
        assert accuracy == pytest.approx(100 * (40 - already - sum(length <= budget for length in lengths)) / 40)


def test_the_median_of_an_even_number_of_successes_lies_between_the_two_in_the_middle(linear_task):
    task = linear_task(n=30)
    for n in (15, 16, 17, 18, 19, 20):
        part = Part(*(each[:n] for each in task.part))
        outcome = run(task.model, part, task.threats["Linf"], "cw", c=10.0)
        lengths = outcome.distances[outcome.broken_by == 1].tolist()
        assert outcome.figures["median_l2"] == pytest.approx(statistics.median(lengths), rel=1e-6)


def test_cw_without_a_success_has_figures_too(digits):
    part = Part(*(each[:10] for each in digits.part))
    outcome = run(digits.model, part, digits.threats["Linf"], "cw", c=1e-9, iterations=1, lr=1e-6)
    assert outcome.figures["success_rate"] == 0
    assert outcome.figures["median_l2"] is None
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    never = Part(part.images, wrong(model, floats(part), part.labels).long() * 0 + 9)
    model[1].weight.data.zero_()
    model[1].bias.data = 2 * torch.eye(10)[0]
    outcome = run(model, never, digits.threats["Linf"], "cw", iterations=1)
    assert (outcome.accuracy, outcome.figures["success_rate"], outcome.figures["median_l2"]) == (0, 0, None)


def test_cw_does_not_depend_on_the_batch_size(digits):
    part = Part(*(each[:12] for each in digits.part))
    outcomes = [run(digits.model, part, digits.threats["Linf"], "cw", c=1.0, batch_size=size) for size in (1, 5, 250)]
    assert (outcomes[0].broken_by == 1).sum() > 3
    for each in outcomes[1:]:
        assert torch.equal(each.broken_by, outcomes[0].broken_by)
        torch.testing.assert_close(each.distances, outcomes[0].distances, rtol=1e-3, atol=1e-4)


def test_cws_search_and_confidence_reach_the_library(digits):
    options = {"search_steps": 3, "c": 0.01, "iterations": 40, "lr": 0.02, "confidence": 0.3, "abort_early": True}
    named = {"binary_search_steps": 3, "initial_const": 0.01, "max_iterations": 40, "learning_rate": 0.02,
             "confidence": 0.3, "abort_early": True}  # fmt: skip
    right = ~wrong(digits.model, floats(digits.part), digits.part.labels)
    part = Part(digits.part.images[right], digits.part.labels[right])
    outcome = run(digits.model, part, digits.threats["Linf"], "cw", **options)
    perturbed = carlini_wagner(digits.model, part, 10, **named)
    assert torch.equal(~outcome.standing, wrong(digits.model, perturbed, part.labels))


def test_advertorch_cannot_be_imported_unmended(monkeypatch):
    """Trap: it imports a function that torch dropped. Should this fail, the mending can go."""
    monkeypatch.delattr(sys.modules["torch.autograd.gradcheck"], "zero_gradients", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "advertorch"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="zero_gradients"):
        importlib.import_module("advertorch.attacks")
    for name in [name for name in sys.modules if name.partition(".")[0] == "advertorch"]:
        del sys.modules[name]


# Transfer


def test_transfer_is_pgd_on_the_other_model(digits, plain_run):
    threat = Threat("Linf", 0.1)
    outcome = run(digits.model, digits.part, threat, "transfer", source=str(plain_run.path), steps=5, seed=2)
    other = load_model(plain_run.path)
    spec = AttackSpec.parse("pgd", threat, {"steps": 5})
    images, labels = floats(digits.part), digits.part.labels
    attack = torchattacks.PGD(other, threat.eps, spec.step_size, 5)
    with fenced_randomness(2, "attack, batch 0"):
        perturbed = attack(images, labels)
    assert torch.equal(~outcome.standing, wrong(digits.model, perturbed, labels))


def test_transfer_from_itself_is_pgd(digits, smoothed_run):
    threat = digits.threats["Linf"]
    itself = run(digits.model, digits.part, threat, "transfer", source=str(smoothed_run.path))
    white = run(digits.model, digits.part, threat, "pgd")
    assert abs(itself.accuracy - white.accuracy) <= 5


def test_transfer_from_a_source_that_changed_starts_anew(digits, plain_run, smoothed_run, tmp_path):
    source, threat = tmp_path / "source.pt", Threat("Linf", 0.1)
    found = []
    for run in (plain_run, smoothed_run):
        shutil.copy(run.path / "checkpoints" / "final.pt", source)
        evaluators = {"it": create("evaluators", "transfer", {"source": str(source)})}
        for journal in (Journal(tmp_path / "journal"), None):
            outcome = evaluate(digits.model, digits.part, evaluators, threat, runtime=CPU, journal=journal)
            found.append(outcome.outcomes["it"].broken_by)
    assert not torch.equal(found[1], found[3])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


def test_transfer_from_nowhere_is_refused(digits):
    with pytest.raises(CheckpointError, match="nowhere"):
        run(digits.model, digits.part, digits.threats["Linf"], "transfer", source="nowhere")


# Attacks of torchattacks by name


def direct_library(attack, digits, seed):
    with fenced_randomness(seed, "attack, batch 0"):
        perturbed = attack(floats(digits.part), digits.part.labels)
    return wrong(digits.model, perturbed, digits.part.labels)


@pytest.mark.parametrize(
    ("name", "norm", "options", "made"),
    [
        ("PGD", "Linf", {"steps": 4, "alpha": 0.01}, {"steps": 4, "alpha": 0.01}),
        ("PGDL2", "L2", {"steps": "4", "random_start": "false"}, {"steps": 4, "random_start": False, "alpha": 0.03}),
        ("APGD", "L2", {"steps": 5}, {"steps": 5, "norm": "L2"}),
        ("MIFGSM", "Linf", {"decay": 0.5}, {"decay": 0.5, "alpha": 0.03 / 4}),
        ("APGDT", "Linf", {"steps": 3}, {"steps": 3, "n_classes": 10}),
        ("EOTPGD", "Linf", {"eot_iter": 3}, {"eot_iter": 3, "alpha": 0.03 / 4}),
    ],
)
def test_any_attack_of_torchattacks_is_an_evaluator(digits, name, norm, options, made):
    threat = digits.threats[norm]
    if name == "PGDL2":
        made = {**made, "alpha": 0.2 * threat.eps}
    outcome = run(digits.model, digits.part, threat, f"torchattacks:{name}", seed=3, **options)
    library = getattr(torchattacks, name)
    seed = {"seed": 3} if "seed" in inspect.signature(library).parameters else {}
    attack = library(digits.model, eps=threat.eps, **made, **seed)
    assert torch.equal(~outcome.standing, direct_library(attack, digits, 3))
    digits.model.eval()
    assert outcome.broken_by.max() == 0


SLOW_ONES = {"SPSA": {"max_batch_size": 8, "nb_sample": 8, "nb_iter": 1}, "Square": {"n_queries": 3},
             "AutoAttack": None, "MultiAttack": None}  # fmt: skip


@pytest.mark.parametrize("name", sorted(
    name for name, each in vars(torchattacks).items()
    if isinstance(each, type) and issubclass(each, torchattacks.attack.Attack) and SLOW_ONES.get(name, {}) is not None
))  # fmt: skip
def test_every_attack_of_torchattacks_runs_or_says_why_not(digits, name):
    part = Part(*(each[:3] for each in digits.part))
    accepted = inspect.signature(getattr(torchattacks, name)).parameters
    options = SLOW_ONES.get(name) or ({"steps": 2} if "steps" in accepted else {})
    for norm in ("Linf", "L2"):
        refusal = None
        try:
            assert run(digits.model, part, digits.threats[norm], f"torchattacks:{name}", **options).notes == []
        except InputError as error:
            refusal = error
        if refusal:  # no radius, another norm, or for colour images alone
            assert f"torchattacks:{name}" in str(refusal)
            assert isinstance(refusal, OptionError) or "to have 3 channels" in str(refusal)


@pytest.mark.parametrize(
    ("name", "norm", "options", "error", "words"),
    [
        ("torchattacks:PGDD", "Linf", {}, PluginError, "torchattacks:PGDD"),
        ("torchattacks:Attack", "Linf", {}, PluginError, "Attack"),
        ("torchattacks:PGD", "L2", {}, OptionError, "measures Linf, the threat is L2"),
        ("torchattacks:PGDL2", "Linf", {}, OptionError, "measures L2, the threat is Linf"),
        ("torchattacks:DeepFool", "L2", {}, OptionError, "torchattacks:DeepFool has no radius"),
        ("torchattacks:PGD", "Linf", {"stepz": 3}, OptionError, "torchattacks:PGD has no option stepz.*steps"),
        ("torchattacks:PGD", "Linf", {"eps": 0.5}, OptionError, "torchattacks:PGD has no option eps"),
        ("torchattacks:PGD", "Linf", {"steps": "many"}, OptionError, "torchattacks:PGD: steps: give int, not 'many'"),
        ("torchattacks:APGD", "Linf", {"loss": "none"}, (OptionError, PluginError), "torchattacks:APGD"),
        ("torch:Tensor", "Linf", {}, PluginError, "not a class derived from at_smooth.Evaluator"),
    ],
)
def test_attacks_that_cannot_be_are_refused(digits, name, norm, options, error, words):
    with pytest.raises(error, match=words):
        run(digits.model, digits.part, digits.threats[norm], name, **options)


def test_torchattacks_autoattack_follows_the_seed_too(digits):
    part = Part(*(each[:4] for each in digits.part))
    seeds = []

    def noted(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        seeds.append(self.seed)

    original = torchattacks.APGD.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchattacks.APGD, "__init__", noted)
        patch.setattr(torchattacks.Square, "forward", lambda self, images, labels: images)
        patch.setattr(torchattacks.FAB, "forward", lambda self, images, labels: images)
        patch.setattr(torchattacks.APGDT, "forward", lambda self, images, labels: images)
        for _ in range(2):
            run(digits.model, part, digits.threats["Linf"], "torchattacks:AutoAttack", seed=5)
    assert len(set(seeds)) == 1


def test_seeding_is_global_as_the_libraries_have_it():
    """Trap: torchattacks draws from the global generator, so an evaluation has to be fenced."""
    seed_global(0, 0, "x")
    before = torch.get_rng_state()
    torchattacks.PGD(nn.Flatten())(torch.rand(2, 2, 1, 1, generator=torch.Generator()), torch.zeros(2).long())
    assert not torch.equal(torch.get_rng_state(), before)
