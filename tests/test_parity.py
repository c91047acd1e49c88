"""Parity with the paper's published code.

The expected numbers are what its functions ``loss_fn_kd``, ``moving_average`` and ``bn_update`` (``utils.py`` of
VITA-Group/Alleviate-Robust-Overfitting at commit 4066275ee391e02bc234bcddc60c2f654719adb0) gave on the tensors that
``pattern`` and ``network`` make here, run once on the CPU in float32 (torch 2.15.0, ``.cuda()`` made a no-op).
"""

import math

import pytest
import torch
from torch import nn

from at_smooth import Schedule, create
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth_plugins.regularizers.self_distillation import distillation_loss

#: loss_fn_kd(pattern(6, 5, seed=1), pattern(6, 5, seed=2), T), by T
KD = {1.0: 2.1585755348205566, 2.0: 7.188747882843018, 5.0: 41.12742233276367}

#: moving_average(average, network(seed), 1 / (n + 1)) for n, seed of (0, 1), (1, 2), (2, 3): all parameters in order
SWA = [
    0.319999963, 0.453333408, -0.759999931, 0.720000029, -0.493333369, -0.360000014, -0.226666719, -0.0933333263,
    -0.200000018, -0.0666667223, -0.719999969, 0.76000005, 0.106666684, 0.240000039, -0.413333386, -0.280000001,
    -0.146666706, -0.0133333616, 0.119999975, 0.25333333, 0.386666715, 0.520000041, 0.653333306, -0.560000002,
    -0.426666677, -0.293333352, -0.159999967, -0.0266666412, 0.106666684, 0.240000039, 0.413333297, -0.800000072,
    -0.106666684, 0.0266666822, 0.720000029, -0.493333369,
]  # fmt: skip

#: bn_update over three batches of 6, 4 and 3 images, on that average: the running statistics
RUNNING_STATISTICS = {
    "1.running_mean": [0.206833392, -0.654925823],
    "1.running_var": [0.133447453, 0.0304665454],
    "5.running_mean": [0.635535479, -0.988702297],
    "5.running_var": [0.172423095, 0.542172551],
}


def pattern(*shape, seed=0):
    """Numbers from -2 to 2 that no generator's version changes."""
    return ((torch.arange(math.prod(shape)) * 37 + seed * 29) % 101).reshape(shape) / 25 - 2


def network(seed):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2), nn.BatchNorm1d(2)
    )
    with torch.no_grad():
        for position, parameter in enumerate(model.parameters()):
            parameter.copy_(pattern(*parameter.shape, seed=seed + 10 * position))
    return model


@pytest.fixture
def average():
    """What SWA makes of three made-up models, one an epoch."""
    smoother = create("smoothers", "swa", {"start": 0})
    smoother.attach(network(99), Schedule(epochs=3, steps_per_epoch=1, first_decay=None))
    for epoch, seed in enumerate((1, 2, 3)):
        assert smoother.after_epoch(network(seed), epoch)
    return smoother.smoothed()


def assert_parity(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", KD)
def test_the_kd_loss_is_the_published_one(temperature):
    found = distillation_loss(pattern(6, 5, seed=1), pattern(6, 5, seed=2), temperature)
    assert_parity(found, KD[temperature])


def test_the_swa_average_is_the_published_one(average):
    assert_parity(torch.cat([parameter.flatten() for parameter in average.parameters()]), SWA)


def test_the_batchnorm_refresh_is_the_published_one(average):
    refresh_batchnorm(average, [pattern(n, 1, 3, 3, seed=n) / 4 + 0.5 for n in (6, 4, 3)])
    for name, expected in RUNNING_STATISTICS.items():
        assert_parity(average.state_dict()[name], expected)
