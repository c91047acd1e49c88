"""What models and plugins do to the tensors that they are given changes nobody else's, and no result."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import PrivateAttr
from torch import nn

from at_smooth import (
    PGD,
    Adversary,
    AttackSpec,
    Data,
    Engine,
    Evaluator,
    Images,
    Method,
    OptionError,
    Part,
    Regularizer,
    Runtime,
    Settings,
    Threat,
    create,
    evaluate,
)
from at_smooth.audit import audit
from at_smooth.audit_bench import Limits
from at_smooth.network import try_out
from at_smooth.own_input import keeps_input, own_input, with_own_input
from at_smooth.transfer import transfer

CPU = Runtime.choose("cpu")
THREAT = Threat("Linf", 0.05)


class Network(nn.Module):
    """Normalises, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.in_place = in_place

    def forward(self, images):
        images = images.sub_(0.5).div_(0.5) if self.in_place else (images - 0.5) / 0.5
        return self.head(images.flatten(1))


def network(in_place):
    torch.manual_seed(0)
    return Network(in_place)


@pytest.fixture
def part():
    """Float images of the caller's own."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(80, 1, 4, 4, generator=rng)
    with torch.no_grad():
        labels = network(in_place=False)(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return Part(images, labels)


EVALUATORS = {
    "clean": {},
    "noise": {"draws": 2},
    "fgsm": {},
    "pgd": {"steps": 3, "restarts": 2},
    "autoattack": {"attacks": ["apgd-ce", "square"]},
    "torchattacks:PGD": {"steps": 2},
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_evaluation_of_a_model_that_works_in_place_is_right(part, name):
    before = copy.deepcopy(part)
    evaluators = {name: create("evaluators", name, EVALUATORS[name])}
    found, expected = (
        evaluate(network(in_place), part, evaluators, THREAT, batch_size=50, runtime=CPU).outcomes[name]
        for in_place in (True, False)
    )
    assert torch.equal(found.broken_by, expected.broken_by)
    assert torch.equal(found.distances, expected.distances)
    assert found.notes == expected.notes
    assert torch.equal(part.images, before.images)
    assert torch.equal(part.labels, before.labels)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.rand(2, 1, 4, 4))])
@pytest.mark.filterwarnings("ignore")  # of TorchScript's age
def test_so_is_one_of_torchscript(part, compiled):
    before, evaluators = part.images.clone(), {"pgd": create("evaluators", "pgd", {"steps": 3})}
    model = compiled(network(True))
    expected = evaluate(network(False), part, evaluators, THREAT, runtime=CPU).outcomes["pgd"]
    found = evaluate(model, part, evaluators, THREAT, runtime=CPU).outcomes["pgd"]
    assert torch.equal(found.broken_by, expected.broken_by)
    assert torch.equal(part.images, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_module_is_refused(part):
    with pytest.raises(OptionError, match="the model is of type function; give"):
        evaluate(lambda images: images, part, {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)


def test_clean_accuracy_of_such_a_model_is_known(part):
    found = evaluate(network(True), part, {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)
    assert found.outcomes["clean"].accuracy == 80


def test_so_is_a_transfer(part):
    before, spec = part.images.clone(), PGD(threat=THREAT, steps=2, mode="eval")
    found, expected = (
        transfer({"one": network(in_place), "two": network(in_place)}, part, spec, runtime=CPU).results()
        for in_place in (True, False)
    )
    assert found == expected
    assert torch.equal(part.images, before)


@pytest.mark.slow
def test_so_is_an_audit(part):
    before, quick = part.images.clone(), Limits(steps=2, more_steps=3, restarts=1, reference="pgd")
    found, expected = (
        audit(network(in_place), part, part, THREAT, limits=quick, runtime=CPU) for in_place in (True, False)
    )
    assert found == expected
    assert torch.equal(part.images, before)


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "torchattacks:MIFGSM"])
def test_an_attack_on_such_a_model_is_right(part, attack):
    spec, images = AttackSpec.parse(attack, THREAT, {"mode": "eval"}), part.images.clone()
    perturbed = []
    for in_place in (True, False):
        torch.manual_seed(2)
        perturbed.append(Adversary(network(in_place), spec)(images, part.labels))
    assert torch.equal(*perturbed)
    assert torch.equal(images, part.images)


def test_trying_a_model_out_leaves_the_images(part):
    images = part.images.clone()
    try_out(network(True), images, 4, attacked=True)
    assert torch.equal(images, part.images)


def data_of(part):
    return Data(part, Part(part.images[:20], part.labels[:20]), Part(part.images[20:40], part.labels[20:40]), 4)


def trained(part, model, **plugins):
    engine = Engine(
        model,
        data_of(part),
        **{"method": create("methods", "trades"), **plugins},
        attack=PGD(threat=THREAT, steps=2),
        settings=Settings(epochs=3, batch_size=16, eval_steps=2, lr=0.1),
        runtime=CPU,
    )
    rows = engine.fit()
    return [{**row, "seconds": 0} for row in rows], engine.model.state_dict()


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("method", ["at", "trades", "mart", "standard"])
def test_training_a_model_that_works_in_place_is_right(part, method):
    before = copy.deepcopy(part)
    results = [
        trained(
            part,
            network(in_place),
            method=create("methods", method),
            regularizer=create("regularizers", "kd-std-adv"),
            smoother=create("smoothers", "ema"),
        )
        for in_place in (True, False)
    ]
    assert_same(*results)
    assert torch.equal(part.images, before.images)
    assert torch.equal(part.labels, before.labels)


class Vandal(Method):
    """Spoils all that it is given, once it has its loss."""

    def loss(self, model, clean, perturbed, targets):
        logits = model(perturbed.clone())
        loss = F.cross_entropy(logits, targets.clone())
        for tensor in (clean, perturbed, targets):
            tensor.zero_()
        return loss, logits


class VandalTerms(Regularizer):
    """So does this."""

    _seen: Any = PrivateAttr(default_factory=list)

    def targets(self, labels, num_classes):
        own = labels.clone()
        labels.zero_()
        return own

    def terms(self, step):
        self._seen.append([step.clean.clone(), step.perturbed.clone(), step.labels.clone(), step.indices.clone()])
        for tensor in (step.clean, step.perturbed, step.labels, step.indices, step.logits.detach()):
            tensor.zero_()
        return {"method": step.loss}

    def state(self):
        return {}


def test_plugins_may_spoil_what_they_are_given(part):
    before = copy.deepcopy(part)
    vandal = VandalTerms()
    assert_same(
        trained(part, network(False), method=Vandal(), regularizer=vandal),
        trained(part, network(False), method=create("methods", "at")),
    )
    for clean, perturbed, labels, indices in vandal._seen:
        assert torch.equal(clean, part.images[indices])
        assert torch.equal(labels, part.labels[indices])
        assert 0 < (perturbed - clean).abs().max() <= 0.05 + 1e-6
    assert torch.equal(part.images, before.images)
    assert torch.equal(part.labels, before.labels)


class VandalEvaluator(Evaluator):
    """Spoils images, labels, the model and its outcome."""

    def perturb(self, task, stage, images, labels):
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.zero_()
        labels.zero_()
        return images.clone() if not images.zero_().any() else images

    def figures(self, task, outcome):
        outcome.broken_by.zero_()
        outcome.distances.zero_()
        return {}


class Idle(Evaluator):
    def perturb(self, task, stage, images, labels):
        return images


def test_an_evaluator_may_spoil_what_it_is_given(part):
    before, model = copy.deepcopy(part), network(False)
    weights = copy.deepcopy(model.state_dict())
    found = evaluate(model, part, {"vandal": VandalEvaluator(), "idle": Idle()}, Threat("Linf", 1.0), runtime=CPU)
    with torch.no_grad():
        black = model(torch.zeros(1, 1, 4, 4)).argmax()
    assert torch.equal(found.outcomes["vandal"].standing, part.labels == black)
    assert found.outcomes["idle"].accuracy == 80
    assert torch.equal(part.images, before.images)
    assert torch.equal(part.labels, before.labels)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_images_are_apart_from_the_arrays_that_they_are_made_of():
    arrays = [np.random.default_rng(0).random((20, 1, 4, 4), dtype=np.float32), np.arange(20) % 2]
    images = Images(*arrays, *arrays, 2)
    data, expected = Data.split(images), Data.split(Images(*map(np.copy, arrays), *map(np.copy, arrays), 2))
    for array in arrays:
        array[:] = 0
    for name in ("train", "val", "test"):
        for tensor, other in zip(getattr(data, name), getattr(expected, name), strict=True):
            assert torch.equal(tensor, other)


# --- the hook


def test_a_borrowed_model_is_as_it_was_afterwards():
    model = network(True)
    with own_input(model):
        assert keeps_input(model)
    assert not keeps_input(model)
    assert not model._forward_pre_hooks


def test_a_network_of_ours_and_one_that_has_a_hook_need_no_other(tiny):
    from at_smooth.experiment import build_engine, prepare_data

    engine = build_engine(tiny(), prepare_data(tiny()), CPU)
    assert keeps_input(engine.model)
    assert not with_own_input(engine.model)._forward_pre_hooks
    model = with_own_input(with_own_input(network(True)))
    assert len(model._forward_pre_hooks) == 1
    assert len(copy.deepcopy(model)._forward_pre_hooks) == 1


def test_the_engine_leaves_no_hook_on_a_model(part):
    model = network(True)
    trained(part, model)
    assert not model._forward_pre_hooks


def test_gradients_reach_the_images_through_the_copy():
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    with_own_input(network(True))(images).sum().backward()
    assert images.grad.abs().sum() > 0
