import pytest
import torch
from torch import nn

from at_smooth import OptionError, create


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"width": 6}),
        ("convnet", {"width": 4}),
        ("convnet", {"width": 2, "stages": 3}),
        ("preact-resnet-18", {"width": 2}),
    ],
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 32, 32)])
def test_images_become_logits(name, options, shape):
    model = create("models", name, options).build(shape, 5)
    images = torch.rand(4, *shape)
    logits = model(images)
    assert logits.shape == (4, 5)
    logits.logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_mlp_has_the_layers_that_it_says(depth):
    width, inputs, classes = 6, 2 * 3 * 4, 5
    model = create("models", "mlp", {"width": width, "depth": depth}).build((2, 3, 4), classes)
    sizes = [inputs] + [width] * depth
    hidden = sum(before * width + 2 * width for before in sizes[:depth])
    assert count(model) == hidden + (sizes[-1] + 1) * classes


@pytest.mark.parametrize("stages", [1, 3])
def test_a_convnet_has_the_stages_that_it_says(stages):
    model = create("models", "convnet", {"width": 4, "stages": stages}).build((3, 9, 9), 5)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == [4, 8, 16][:stages]
    sides = {1: 9, 3: 3}
    assert model[-1].in_features == 4 * 2 ** (stages - 1) * sides[stages] ** 2


def test_a_convnet_refuses_images_that_are_too_small():
    with pytest.raises(OptionError, match=r"4 stages need images of at least 8 pixels a side, not 7x9"):
        create("models", "convnet", {"stages": 4}).build((1, 7, 9), 2)


def test_preact_resnet_18_has_the_fields_size():
    assert count(create("models", "preact-resnet-18").build((3, 32, 32), 10)) == 11_172_170


def test_preact_resnet_18_has_17_convolutions_and_3_shortcuts():
    model = create("models", "preact-resnet-18", {"width": 2}).build((3, 32, 32), 10)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert (kernels.count((3, 3)), kernels.count((1, 1))) == (17, 3)
