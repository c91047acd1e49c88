import copy

import pytest
import torch
from torch import nn

from at_smooth import OptionError, Schedule, create


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def attached(name, model, epochs=8, first_decay=2, **options):
    smoother = create("smoothers", name, options)
    smoother.attach(model, Schedule(epochs, 5, first_decay))
    return smoother


def change(model, epoch):
    """A made-up epoch: weights move, by a step that depends on the epoch alone."""
    rng = torch.Generator().manual_seed(epoch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng))


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def mean(epochs):
    return [sum(each) / len(epochs) for each in zip(*epochs, strict=True)]


def run(smoother, model, epochs, begin=0):
    """Train; give the weights after each epoch, and the epochs in which the average moved."""
    seen, moved = [], []
    for epoch in range(begin, epochs):
        smoother.before_epoch(model, epoch)
        change(model, epoch)
        smoother.after_step(model, epoch)
        seen.append(parameters(model))
        if smoother.after_epoch(model, epoch):
            moved.append(epoch)
    return seen, moved


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, [2, 3, 4, 5, 6, 7]),
        ({"start": 0}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"start": 5}, [5, 6, 7]),
        ({"every": 2}, [2, 4, 6]),
        ({"start": 1, "every": 3}, [1, 4, 7]),
    ],
    ids=str,
)
def test_swa_is_the_plain_mean_of_the_epochs_weights(options, taken):
    model = network()
    smoother = attached("swa", model, **options)
    seen, moved = run(smoother, model, 8)
    assert moved == taken
    torch.testing.assert_close(parameters(smoother.smoothed()), mean([seen[epoch] for epoch in taken]))


@pytest.mark.parametrize(("first_decay", "start"), [(3, 3), (None, 4)])
def test_the_average_begins_after_the_first_decay_or_half_of_the_training(first_decay, start):
    model = network()
    _, moved = run(attached("swa", model, first_decay=first_decay), model, 8)
    assert moved[0] == start


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_the_raw_model_is_left_alone(name):
    model, alone = network(), network()
    run(attached(name, model, start=0), model, 4)
    run(attached("none", alone), alone, 4)
    assert all(torch.equal(*pair) for pair in zip(parameters(model), parameters(alone), strict=True))


@pytest.mark.parametrize("name", ["swa", "iswa"])
def test_there_is_no_average_before_it_begins(name):
    model = network()
    smoother = attached(name, model)
    seen, moved = run(smoother, model, 2)
    assert (smoother.smoothed(), moved) == (None, [])
    plain = network()
    torch.testing.assert_close(seen, run(attached("none", plain), plain, 2)[0])


def test_iswa_starts_each_epoch_from_the_average():
    model = network()
    smoother = attached("iswa", model, start=1)
    run(smoother, model, 6)

    raw, average, n = network(), None, 0
    for epoch in range(6):
        if average:
            with torch.no_grad():
                for own, averaged in zip(raw.parameters(), average, strict=True):
                    own.copy_(averaged)
        change(raw, epoch)  # W_T = W_SWA(T-1) + dW
        if epoch >= 1:
            average = [
                (w * n + own) / (n + 1) for w, own in zip(average or parameters(raw), parameters(raw), strict=True)
            ]
            n += 1
    torch.testing.assert_close(parameters(smoother.smoothed()), average)
    torch.testing.assert_close(parameters(model), parameters(raw))


def test_iswa_takes_the_averages_batchnorm_statistics_along():
    model = network()
    smoother = attached("iswa", model, start=0)
    run(smoother, model, 1)
    smoother.smoothed()[1].running_mean.fill_(7)
    smoother.before_epoch(model, 1)
    assert (model[1].running_mean == 7).all()


@pytest.mark.parametrize("name", ["swa", "iswa", "ema"])
def test_the_average_is_in_eval_mode_and_does_not_learn(name):
    model = network().train()
    smoother = attached(name, model, start=0)
    run(smoother, model, 2)
    assert not any(module.training for module in smoother.smoothed().modules())
    assert not any(parameter.requires_grad for parameter in smoother.smoothed().parameters())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["swa", "iswa"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_restored_average_continues_exactly(name, stop):
    whole_model, model = network(), network()
    whole, begun = attached(name, whole_model), attached(name, model)
    run(whole, whole_model, 8)
    run(begun, model, stop)
    state = copy.deepcopy(begun.state())
    continued = attached(name, network())
    continued.restore(state)
    run(continued, model, 8, begin=stop)
    for one, other in ((whole_model, model), (whole.smoothed(), continued.smoothed())):
        assert all(torch.equal(*pair) for pair in zip(parameters(one), parameters(other), strict=True))


@pytest.mark.parametrize("options", [{"start": -1}, {"every": 0}, {"evry": 2}], ids=str)
def test_wrong_options_are_refused(options):
    with pytest.raises(OptionError, match=f"smoother swa: {next(iter(options))}"):
        create("smoothers", "swa", options)


def train_steps(smoother, model, steps, begin=0):
    """Train with 5 steps an epoch; give the weights after each step, and the epochs in which the average moved."""
    seen, moved = [], []
    for step in range(begin, steps):
        change(model, step)
        smoother.after_step(model, step)
        seen.append(parameters(model))
        if step % 5 == 4 and smoother.after_epoch(model, step // 5):
            moved.append(step // 5)
    return seen, moved


@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (0.5, 0), (0.9, 1), (0, 2)])
def test_ema_is_its_closed_form(decay, start):
    """W_EMA = decay^n w_0 + (1 - decay) sum_i decay^(n - i) w_i, over the steps from the start on."""
    model = network()
    smoother = attached("ema", model, decay=decay, start=start)
    seen, moved = train_steps(smoother, model, 15)
    first, *later = seen[5 * start :]
    n = len(later)
    shares = [decay**n] + [(1 - decay) * decay ** (n - i) for i in range(1, n + 1)]
    expected = [sum(s * w for s, w in zip(shares, each, strict=True)) for each in zip(first, *later, strict=True)]
    torch.testing.assert_close(parameters(smoother.smoothed()), expected)
    assert moved == list(range(start, 3))


def test_ema_follows_the_weights_from_the_first_step_on():
    model = network()
    smoother = attached("ema", model)
    assert smoother.smoothed() is None
    seen, _ = train_steps(smoother, model, 1)
    torch.testing.assert_close(parameters(smoother.smoothed()), seen[0])


def test_ema_waits_for_its_start():
    model = network()
    smoother = attached("ema", model, start=2)
    train_steps(smoother, model, 10)
    assert smoother.smoothed() is None
    train_steps(smoother, model, 11, begin=10)
    assert smoother.smoothed() is not None


@pytest.mark.parametrize("stop", [3, 10])
def test_a_restored_ema_continues_exactly(stop):
    whole_model, model = network(), network()
    whole, begun = (attached("ema", each, start=1, decay=0.8) for each in (whole_model, model))
    train_steps(whole, whole_model, 20)
    train_steps(begun, model, stop)
    state = copy.deepcopy(begun.state())
    continued = attached("ema", network(), start=1, decay=0.8)
    continued.restore(state)
    train_steps(continued, model, 20, begin=stop)
    assert all(
        torch.equal(*pair) for pair in zip(parameters(whole.smoothed()), parameters(continued.smoothed()), strict=True)
    )


@pytest.mark.parametrize("options", [{"decay": 1}, {"decay": -0.1}, {"start": -1}, {"every": 2}], ids=str)
def test_wrong_options_of_ema_are_refused(options):
    with pytest.raises(OptionError, match=f"smoother ema: {next(iter(options))}"):
        create("smoothers", "ema", options)


@pytest.mark.parametrize("name", ["swa", "iswa", "ema"])
def test_an_average_that_would_never_begin_is_refused(name):
    with pytest.raises(OptionError, match=r"begins after 8 epochs, but training ends after 8.*-S start"):
        attached(name, network(), epochs=8, start=8)


def test_swa_begins_half_way_where_the_first_drop_lies_beyond_the_end():
    model = network()
    smoother = attached("swa", model, epochs=4, first_decay=50)
    assert [smoother.after_epoch(model, epoch) for epoch in range(4)] == [False, False, True, True]
