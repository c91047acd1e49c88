import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from at_smooth.batchnorm import refresh_batchnorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(75))


def batches(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [torch.rand(n, 2, 5, 5, generator=rng) + n / 10 for n in sizes]


def test_statistics_are_means_over_batches_weighed_by_size():
    model, images = network().eval(), batches(6, 4, 2)
    refresh_batchnorm(model, images)
    with torch.no_grad():
        features = [model[0](batch) for batch in images]
    share = torch.tensor([6, 4, 2]) / 12
    mean = sum(s * each.mean((0, 2, 3)) for s, each in zip(share, features, strict=True))
    var = sum(s * each.transpose(0, 1).flatten(1).var(1) for s, each in zip(share, features, strict=True))
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_it_agrees_with_torch_where_batches_are_equal():
    model, images = network(), batches(4, 4, 4)
    reference = copy.deepcopy(model)
    refresh_batchnorm(model, images)
    update_bn(images, reference)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_what_was_there_before_is_forgotten():
    model, stale = network(), network()
    stale[1].running_mean.fill_(100)
    for each in (model, stale):
        refresh_batchnorm(each, batches(4, 4))
    assert torch.equal(model[1].running_mean, stale[1].running_mean)


@pytest.mark.parametrize("training", [True, False])
def test_weights_modes_and_momenta_stay(training):
    model = network().train(training)
    model[1].momentum = 0.3
    weights = copy.deepcopy(dict(model.named_parameters()))
    refresh_batchnorm(model, batches(4, 3))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == [training] * 6
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)


def test_a_model_without_batchnorm_passes():
    model = nn.Linear(3, 2)
    weights = copy.deepcopy(model.state_dict())
    refresh_batchnorm(model, [torch.rand(4, 3)])
    assert torch.equal(model.weight, weights["weight"])


def test_layers_that_the_raw_model_holds_frozen_keep_their_statistics():
    raw = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    raw[0].running_mean.fill_(3)
    raw[0].eval()
    average = copy.deepcopy(raw).eval()
    images = torch.rand(8, 2, 3, 3)
    refresh_batchnorm(average, [images], raw)
    assert average[0].running_mean.tolist() == [3, 3]
    frozen = raw[0](images)
    torch.testing.assert_close(average[1].running_mean, frozen.mean((0, 2, 3)))
    assert not any(module.training for module in average)


@pytest.mark.parametrize(("smoother", "refreshes"), [("swa", 2), ("iswa", 4), ("ema", 2)])
def test_statistics_are_refreshed_where_they_are_looked_at_and_the_numbers_stay(
    toy_data, smoother, refreshes, monkeypatch
):
    from at_smooth import AttackSpec, Engine, Runtime, Settings, Threat, create, engine

    calls = []
    original = engine.refresh_batchnorm
    monkeypatch.setattr(engine, "refresh_batchnorm", lambda *args: calls.append(1) or original(*args))

    def rows(**measuring):
        torch.manual_seed(0)
        calls.clear()
        return Engine(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
            toy_data(),
            method=create("methods", "at"),
            attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1}),
            smoother=create("smoothers", smoother, {"start": 1}),
            settings=Settings(epochs=5, batch_size=18, eval_steps=1, test_every=0, **measuring),
            runtime=Runtime.choose("cpu"),
        ).fit()

    often = rows()
    assert len(calls) == 4
    seldom = rows(validate_every=3)  # after epochs 3 and 5
    assert len(calls) == refreshes
    for epoch in (2, 4):
        assert {**seldom[epoch], "seconds": 0} == {**often[epoch], "seconds": 0}
