"""BatchNorm within the layer before it: the same numbers, and only where a sequence runs both."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from at_smooth import fast_convolution
from at_smooth.fast_layers import fast_layers


@pytest.fixture(autouse=True, params=[True, False], ids=["winograd", "direct"])
def products(request, monkeypatch):
    """As on a processor where Winograd pays, and on another."""
    monkeypatch.setattr(fast_convolution, "products_are_fast", lambda: request.param)


def taught(norm, features):
    """BatchNorm with statistics and weights as training leaves them."""
    torch.manual_seed(1)
    norm(torch.randn(64, norm.num_features, *features) * 3 + 1)
    if norm.affine:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    return norm


def pair(name):
    """Two layers, and the shape of an image."""
    torch.manual_seed(0)
    layers = {
        "linear": ((nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,)),
        "linear without bias": ((nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), (5,)),
        "without weights": ((nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)), (5,)),
        "convolution": ((nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)), (3, 9, 8)),
        "groups": ((nn.Conv2d(4, 8, (3, 1), dilation=2, groups=2), nn.BatchNorm2d(8)), (4, 9, 8)),
        "in words": ((nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4)), (3, 5, 5)),
        "large": ((nn.Conv2d(96, 100, 3, padding=1), nn.BatchNorm2d(100)), (96, 8, 8)),
        "large without bias": ((nn.Conv2d(96, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96)), (96, 8, 8)),
    }
    (layer, norm), shape = layers[name]
    return layer, taught(norm, shape[1:]), shape


def sequence(*layers):
    return nn.Sequential(*layers).requires_grad_(False).to(memory_format=torch.channels_last).eval()


def batchnorms_that_ran(model, images, monkeypatch):
    """How many BatchNorm layers were called, in whatever form."""
    seen, own = [], nn.Module.__call__
    with monkeypatch.context() as patched:
        patched.setattr(
            nn.Module,
            "__call__",
            lambda self, *given: seen.append(isinstance(self, (nn.BatchNorm1d, nn.BatchNorm2d))) or own(self, *given),
        )
        model(images)
    return sum(seen)


NAMES = ["linear", "linear without bias", "without weights", "convolution", "groups", "in words"]


@pytest.mark.parametrize("name", [*NAMES, "large", "large without bias"])
def test_the_two_are_one_and_the_same(name, monkeypatch):
    layer, norm, shape = pair(name)
    model = sequence(layer, norm, nn.ReLU())
    images = torch.randn(16, *shape, requires_grad=True)
    wanted = model(images)
    ahead = torch.randn_like(wanted)
    (wanted_gradient,) = torch.autograd.grad(wanted, images, ahead)
    with fast_layers(model):
        assert batchnorms_that_ran(model, images, monkeypatch) == 0
        found = model(images)
        (gradient,) = torch.autograd.grad(found, images, ahead)
        torch.testing.assert_close(norm(layer(images)).relu(), wanted, rtol=1e-4, atol=1e-4)  # called one by one
    assert batchnorms_that_ran(model, images, monkeypatch) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


def test_a_known_answer():
    """y = ((2 x + 1) - 3) / sqrt(4) * 5 + 7 = 5 x + 2."""
    layer, norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0)
    for tensor, value in (
        *((layer.weight, 2), (layer.bias, 1), (norm.running_mean, 3)),
        *((norm.running_var, 4), (norm.weight, 5), (norm.bias, 7)),
    ):
        tensor.data.fill_(value)
    model = sequence(layer, norm)
    with fast_layers(model):
        assert model(torch.tensor([[10.0]])).item() == 52


def test_several_pairs_and_what_stands_between():
    first, second = pair("convolution"), pair("linear")
    model = sequence(
        nn.Dropout(), *first[:2], nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    model = sequence(*model, *second[:2], nn.BatchNorm1d(4))
    images = torch.randn(6, *first[2])
    wanted = model(images)
    with fast_layers(model):
        torch.testing.assert_close(model(images), wanted)


class Own(nn.Linear):
    """Someone's own."""


class Listening(nn.Sequential):
    """Someone's own sequence."""


def watched(attach, afterwards=lambda model: None):
    layer, norm, _ = pair("linear")
    attach(layer, norm)
    model = sequence(layer, norm)
    afterwards(model)
    return model


AS_THEY_ARE = {
    "an own layer": lambda: sequence(Own(5, 4), pair("linear")[1]),
    "an own sequence": lambda: Listening(*pair("linear")[:2]).requires_grad_(False).eval(),
    "computed weights": lambda: sequence(nn.utils.weight_norm(nn.Linear(5, 4)), pair("linear")[1]),
    "something between": lambda: sequence(nn.Linear(5, 4), nn.ReLU(), pair("linear")[1]),
    "a hook on the layer": lambda: watched(lambda layer, norm: layer.register_forward_hook(lambda *given: None)),
    "a hook on BatchNorm": lambda: watched(lambda layer, norm: norm.register_forward_hook(lambda *given: None)),
    "a hook before it": lambda: watched(lambda layer, norm: norm.register_forward_pre_hook(lambda *given: None)),
    "a hook on gradients": lambda: watched(lambda layer, norm: norm.register_full_backward_hook(lambda *given: None)),
    "another padding": lambda: sequence(nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular"), pair("convolution")[1]),
    "a bias that learns": lambda: watched(lambda layer, norm: None, lambda model: model[0].bias.requires_grad_(True)),
    "learning": lambda: sequence(*pair("linear")[:2]).requires_grad_(True),
    "train mode": lambda: sequence(*pair("linear")[:2]).train(),
    "an own way": lambda: watched(lambda layer, norm: vars(layer).update(forward=nn.Linear(5, 4).forward)),
    "double": lambda: sequence(*pair("linear")[:2]).double(),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_others_run_as_they_are(name, monkeypatch):
    model = AS_THEY_ARE[name]()
    shape = (7, 5, 6, 6) if isinstance(model[0], nn.Conv2d) else (7, 5)
    images = torch.randn(shape, dtype=torch.float64 if name == "double" else torch.float32)
    wanted = model(images)
    with fast_layers(model):
        assert batchnorms_that_ran(model, images, monkeypatch) == 1
        torch.testing.assert_close(model(images), wanted)


def test_what_changes_meanwhile_is_seen():
    """The mode, the number of dimensions, the arithmetic."""
    layer, norm, _ = pair("linear")
    model = sequence(layer, norm)
    flat, deep = torch.randn(8, 5), torch.randn(8, 4, 5)
    wanted = model(deep)
    with fast_layers(model):
        torch.testing.assert_close(model(deep), wanted)  # BatchNorm's channels are not the linear layer's
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(flat).dtype == torch.bfloat16
        norm.train()
        torch.testing.assert_close(model(flat).mean(0), norm.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(4), None])
def test_mistakes_stay_mistakes(norm):
    model = sequence(nn.Linear(5, 4), norm or nn.Identity())
    model[1] = norm
    with fast_layers(model), pytest.raises((RuntimeError, ValueError, TypeError)):
        model(torch.randn(8, 5))


def test_hooks_that_come_later_see_what_they_saw():
    layer, norm, _ = pair("linear")
    model, images, seen = sequence(layer, norm), torch.randn(8, 5), []
    with fast_layers(model):
        for each in (layer, norm):
            with each.register_forward_hook(lambda module, given, output: seen.append(output)):
                model(input=images)
    torch.testing.assert_close(seen, [layer(images), norm(layer(images))])


def test_hooks_of_all_modules_see_every_layer():
    layer, norm, _ = pair("linear")
    model, seen = sequence(layer, norm), []
    with fast_layers(model), register_module_forward_hook(lambda module, given, output: seen.append(module)):
        model(torch.randn(8, 5))
    assert seen == [layer, norm, model]
