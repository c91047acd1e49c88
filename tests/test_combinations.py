"""Everything that the distribution registers works with everything else."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from at_smooth import AttackSpec, Engine, Observer, Runtime, Settings, Threat, create, registry


def own(kind):
    """The names that at-smooth itself registers."""
    return [entry.name for entry in registry.entries(kind) if entry.distribution == "at-smooth"]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class Desk:
    """Frozen teachers made beforehand, one a method; remembers how they were."""

    def __init__(self):
        self.models = {"standard": network(1), "at": network(2)}
        for model in self.models.values():
            model.requires_grad_(False).eval()
        self.before = self.weights()
        self.asked = set()

    def get(self, method, path=None, **changes):
        self.asked.add(method)
        return self.models[method]

    def weights(self):
        return {method: copy.deepcopy(model.state_dict()) for method, model in self.models.items()}

    def assert_untouched(self):
        for method, model in self.models.items():
            assert not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            now = model.state_dict()
            assert all(torch.equal(tensor, now[name]) for name, tensor in self.before[method].items())


class Steps(Observer):
    """After each step: how large the loss was, and that every weight of the student had a gradient."""

    def __init__(self):
        self.losses = []

    def stepped(self, engine):
        self.losses.append(engine.last_loss)
        for name, parameter in engine.model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert any(parameter.grad.abs().sum() > 0 for parameter in engine.model.parameters())


@pytest.fixture(scope="module")
def data(toy_data):
    return toy_data(n=16, test=4)


def train_two_steps(data, norm, method, regularizer="none", smoother="none", attack="pgd", options=None):
    """One step an epoch, so that smoothers of epochs smooth too; gives the engine, its steps and its teachers."""
    desk, steps = Desk(), Steps()
    engine = Engine(
        network(0),
        data,
        method=create("methods", method),
        attack=AttackSpec.parse(attack, Threat(norm, {"Linf": 0.1, "L2": 0.5}[norm]), options or {}),
        regularizer=create("regularizers", regularizer),
        smoother=create("smoothers", smoother),
        settings=Settings(epochs=2, batch_size=16, eval_steps=1, validate_every=2, test_every=0),
        runtime=Runtime.choose("cpu"),
        teachers=desk,
    )
    before = copy.deepcopy(engine.model.state_dict())
    engine.fit(steps)
    assert len(steps.losses) == 2
    assert torch.tensor(steps.losses).isfinite().all()
    moved = [name for name, parameter in engine.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) == len(list(engine.model.parameters()))
    desk.assert_untouched()
    return engine, desk


@pytest.mark.parametrize(
    ("regularizer", "method", "smoother"), [*product(own("regularizers"), own("methods"), own("smoothers"))]
)
def test_every_regularizer_works_with_every_method_and_smoother(data, regularizer, method, smoother):
    engine, desk = train_two_steps(data, "Linf", method, regularizer, smoother, options={"steps": 2})
    assert (desk.asked != set()) == regularizer.startswith("kd")
    average = engine.smoother.smoothed()
    assert (average is None) == (smoother == "none")
    if average is not None:
        assert all(tensor.isfinite().all() for tensor in average.state_dict().values())
        assert all(parameter.grad is None for parameter in average.parameters())


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("method", own("methods"))
def test_every_method_trains_on_every_attack_in_every_norm(data, method, norm, attack):
    train_two_steps(data, norm, method, attack=attack)


def test_the_combinations_are_those_that_are_meant():
    assert {"standard", "at", "trades", "mart"} <= set(own("methods"))
    assert {"none", "label-smoothing", "tf-kd", "kd-std", "kd-adv", "kd-std-adv"} <= set(own("regularizers"))
    assert {"none", "swa", "iswa", "ema"} <= set(own("smoothers"))
