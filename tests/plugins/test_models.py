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
        ("preact-resnet-50", {"width": 2}),
        ("vgg-16", {"width": 2}),
        ("wrn-34-4", {"width": 1, "depth": 10}),
        ("wrn-34-10", {"width": 2, "depth": 16, "dropout": 0.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 9, 13), (3, 9, 13), (1, 32, 32), (3, 32, 32)], ids=str)
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


@pytest.mark.parametrize(
    ("name", "ten", "hundred"),
    [
        ("preact-resnet-18", 11_172_170, 11_218_340),
        ("preact-resnet-50", 23_513_162, 23_697_572),
        ("vgg-16", 14_728_266, 14_774_436),
        ("wrn-34-4", 7_399_130, 7_422_260),
        ("wrn-34-10", 46_160_474, 46_218_164),
    ],
)
def test_the_papers_models_are_as_large_as_the_published_ones(name, ten, hundred):
    """The numbers: parameters of the published code's own classes (VITA-Group/Alleviate-Robust-Overfitting, models/).

    That code's normalisation layer has none.
    """
    with torch.device("meta"):
        sizes = [count(create("models", name).build((3, 32, 32), classes)) for classes in (10, 100)]
    assert sizes == [ten, hundred]


def test_preact_resnet_18_has_17_convolutions_and_3_shortcuts():
    model = create("models", "preact-resnet-18", {"width": 2}).build((3, 32, 32), 10)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert (kernels.count((3, 3)), kernels.count((1, 1))) == (17, 3)


@pytest.mark.parametrize(("depth", "convolutions"), [(10, 7), (16, 13), (34, 31)])
def test_a_wide_resnet_has_the_depth_that_it_says(depth, convolutions):
    with torch.device("meta"):
        model = create("models", "wrn-34-4", {"depth": depth, "width": 2}).build((3, 32, 32), 10)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    kernels = [layer.kernel_size for layer in layers]
    assert (kernels.count((3, 3)), kernels.count((1, 1))) == (convolutions, 3)
    assert max(layer.out_channels for layer in layers) == 2 * 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 11}, "depth: depth 11 is not 6 n . 4, as in 10, 16"),
        ({"depth": 4}, "depth: .*greater than or equal to 10"),
        ({"width": 0}, "width: .*greater than or equal to 1"),
        ({"dropout": 1}, "dropout: .*less than 1"),
    ],
)
@pytest.mark.parametrize("name", ["wrn-34-4", "wrn-34-10"])
def test_a_wide_resnet_that_cannot_be_is_refused(name, options, words):
    with pytest.raises(OptionError, match=f"model {name}: {words}"):
        create("models", name, options)


@pytest.mark.parametrize(("side", "poolings"), [(8, 3), (31, 4), (32, 5), (64, 5)])
def test_vgg_16_pools_where_the_image_has_room(side, poolings):
    with torch.device("meta"):
        model = create("models", "vgg-16", {"width": 2}).build((3, side, side), 10)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == poolings
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 13
