"""What an attack runs in faster forms is the same up to rounding, and only while it runs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from at_smooth import (
    Data,
    Engine,
    Part,
    Recipe,
    Regularizer,
    Runtime,
    Settings,
    Threat,
    create,
    fast_convolution,
    load_model,
    train,
)
from at_smooth.attacks import Adversary, AttackSpec
from at_smooth.fast_layers import fast_layers
from at_smooth.network import Normalize
from at_smooth.scratch import SCRATCH
from at_smooth.winograd import winograd_conv2d

products_are_fast = fast_convolution.products_are_fast


@pytest.fixture(autouse=True)
def on_intel(monkeypatch):
    """As on a processor where Winograd pays."""
    monkeypatch.setattr(fast_convolution, "products_are_fast", lambda: True)


# (channels, filters, height, width) that are and are not made of whole tiles
SIZES = [(96, 96, 8, 8), (100, 128, 4, 16), (3, 5, 7, 9), (1, 1, 1, 1), (8, 2, 2, 13)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
def test_winograds_convolution_is_torchs(size, layout):
    channels, filters, height, width = size
    torch.manual_seed(0)
    images = torch.randn(5, channels, height, width).to(memory_format=layout).requires_grad_()
    weight = torch.randn(filters, channels, 3, 3).to(memory_format=layout)
    ours = winograd_conv2d(images, weight)
    exact = F.conv2d(images.double(), weight.double(), padding=1)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    scale = weight.double().square().sum((1, 2, 3)).mean().sqrt()  # of an output
    assert (ours - exact).abs().max() < 1e-4 * scale
    ahead = torch.randn(exact.shape)
    (gradient,) = torch.autograd.grad(ours, images, ahead)
    (wanted,) = torch.autograd.grad(exact, images, ahead.double())
    assert (gradient - wanted).abs().max() < 1e-4 * weight.double().square().sum((0, 2, 3)).mean().sqrt()


def test_a_known_convolution():
    """A filter that takes the pixel above, on an image of one bright pixel."""
    images, weight = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 3, 3)
    images[0, 0, 2, 3], weight[0, 0, 0, 1] = 5, 2
    wanted = torch.zeros(1, 1, 6, 6)
    wanted[0, 0, 3, 3] = 10
    assert (winograd_conv2d(images, weight) - wanted).abs().max() < 1e-4


def test_the_default_dtype_does_not_matter():
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    torch.set_default_dtype(torch.float64)
    try:
        assert winograd_conv2d(images, weight).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_batch_in_pieces_is_the_batch(monkeypatch):
    torch.manual_seed(0)
    images, weight = torch.randn(7, 4, 8, 8), torch.randn(4, 4, 3, 3)
    whole = winograd_conv2d(images, weight)
    monkeypatch.setattr("at_smooth.winograd._AT_ONCE", 2 * 36 * 4 * 4)  # two images
    torch.testing.assert_close(winograd_conv2d(images, weight), whole, rtol=1e-4, atol=1e-4)
    with SCRATCH.kept():
        torch.testing.assert_close(winograd_conv2d(images, weight), whole, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_torchs():
    """Through a way beside the convolution, too."""
    torch.manual_seed(0)
    images, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(3, 3, 3, 3)
    found = []
    for convolve in (winograd_conv2d, lambda images, weight: F.conv2d(images, weight, padding=1)):
        (once,) = torch.autograd.grad((images + convolve(images, weight)).sigmoid().sum(), images, create_graph=True)
        found.append(torch.autograd.grad(once.square().sum(), images)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [8, 6])
def test_what_comes_out_can_be_changed_in_place(size):
    images = torch.randn(32, 96, size, size, requires_grad=True)
    out = winograd_conv2d(images, torch.randn(96, 96, 3, 3))
    out += images
    (gradient,) = torch.autograd.grad(F.relu(out, inplace=True).sum(), images)
    assert gradient.abs().sum() > 0


class Own(nn.Conv2d):
    """Someone's own convolution, whose class is not torch's."""


def conv(**changes):
    return nn.Conv2d(**{"in_channels": 96, "out_channels": 96, "kernel_size": 3, "padding": 1, **changes})


FASTER = {
    "a convolution": conv(),
    "without bias": conv(bias=False),
    "BatchNorm": nn.BatchNorm2d(96),
    "BatchNorm without weights": nn.BatchNorm2d(96, affine=False),
}
AS_THEY_ARE = {
    "few channels": conv(in_channels=96, out_channels=64),
    "a stride": conv(stride=2),
    "no padding": conv(padding=0),
    "padding in words": conv(padding="same"),
    "another padding": conv(padding_mode="circular"),
    "a dilation": conv(dilation=2, padding=2),
    "groups": conv(groups=2),
    "another filter": conv(kernel_size=5, padding=2),
    "someone's own": Own(96, 96, 3, padding=1),
    "weights that are computed": nn.utils.spectral_norm(conv()),
    "BatchNorm without statistics": nn.BatchNorm2d(96, track_running_stats=False),
}


def learned(layer):
    """In eval mode, with statistics as training leaves them, and as the engine places it."""
    layer = copy.deepcopy(layer).requires_grad_(False).to(memory_format=torch.channels_last)
    if isinstance(layer, nn.BatchNorm2d):
        layer(torch.randn(8, 96, 8, 8) * 3 + 1)
        if layer.affine:
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    return layer.eval()


def ran_fast(layer, images):
    """Whether torch's own layer was not asked."""
    asked = []
    own = type(layer).forward
    type(layer).forward = lambda self, *given: asked.append(1) or own(self, *given)
    try:
        layer(images)
    finally:
        type(layer).forward = own
    return not asked


@pytest.mark.parametrize("name", [*FASTER, *AS_THEY_ARE])
def test_which_layers_are_faster_and_that_they_are_the_same(name):
    torch.manual_seed(0)
    layer = learned({**FASTER, **AS_THEY_ARE}[name])
    images = torch.randn(9, 96, 8, 8, requires_grad=True)
    ahead = torch.randn_like(layer(images))
    before = layer(images), *torch.autograd.grad(layer(images), images, ahead)
    with fast_layers(nn.Sequential(layer)):
        assert ran_fast(layer, images) == (name in FASTER)
        now = layer(images), *torch.autograd.grad(layer(images), images, ahead)
    assert not ran_fast(layer, images)
    for was, became in zip(before, now, strict=True):
        torch.testing.assert_close(became, was, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("processor", "mkl", "pays"),
    [
        ("Intel(R) Xeon(R) Processor", True, True),
        ("Intel64 Family 6 Model 85 Stepping 7, GenuineIntel", True, True),
        ("Intel(R) Xeon(R) Processor", False, False),
        ("AMD EPYC 9654 96-Core Processor", True, False),
        ("arm", False, False),
    ],
)
def test_winograd_is_for_where_products_are_fast(processor, mkl, pays, monkeypatch):
    monkeypatch.setattr(fast_convolution, "processor_name", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(fast_convolution, "products_are_fast", products_are_fast)
    images, layer = torch.randn(9, 96, 8, 8), learned(conv())
    with fast_layers(layer):
        assert ran_fast(layer, images) == pays
    norm = learned(nn.BatchNorm2d(96))
    with fast_layers(norm):
        assert ran_fast(norm, images)  # is faster anywhere


@pytest.mark.parametrize("dims", [(20, 7), (20, 7, 3), (20, 7, 2, 2), (20, 7, 2, 2, 2)])
def test_batchnorm_of_any_dimensions(dims):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer, features = kinds[len(dims)](7), torch.randn(dims) * 2 - 1
    layer(features)
    wanted = layer.eval().requires_grad_(False)(features)
    with fast_layers(layer):
        assert ran_fast(layer, features)
        torch.testing.assert_close(layer(features), wanted)


@pytest.mark.parametrize(
    ("shape", "faster"),
    [
        ((32, 96, 4, 4), True),  # one tile each
        ((31, 96, 4, 4), False),  # too few tiles
        ((32, 96, 5, 5), False),  # four tiles for what fills little more than one
        ((9, 96, 14, 14), True),
        ((96, 8, 8), False),  # one image without a batch
    ],
)
def test_small_and_odd_images_are_convolved_as_ever(shape, faster):
    layer = learned(conv())
    with fast_layers(layer):
        assert ran_fast(layer, torch.randn(shape)) == faster


@pytest.mark.parametrize("name", FASTER)
def test_other_arithmetics_are_left_alone(name):
    images = torch.randn(32, 96, 4, 4)
    layer = learned(FASTER[name])
    with fast_layers(layer):
        assert ran_fast(layer, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a model's own, say
            assert not ran_fast(layer, images)
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_layers(layer):
        assert "forward" not in vars(layer)
    with fast_layers(layer.double()):
        assert not ran_fast(layer, images.double())


@pytest.mark.parametrize("name", FASTER)
def test_what_learns_or_lies_otherwise_in_memory_runs_as_ever(name):
    images, layer = torch.randn(32, 96, 4, 4), learned(FASTER[name])
    learning = copy.deepcopy(layer).requires_grad_()
    with fast_layers(learning):
        if list(learning.parameters()):
            assert not ran_fast(learning, images)
            learning(images).sum().backward()
            assert all(parameter.grad is not None for parameter in learning.parameters())
    if isinstance(layer, nn.Conv2d):
        with fast_layers(layer.to(memory_format=torch.contiguous_format)):
            assert not ran_fast(layer, images)


def test_batchnorm_that_is_changed_while_it_runs_is_not_mistaken():
    layer, features = learned(nn.BatchNorm2d(96)), torch.randn(32, 96, 4, 4)
    with fast_layers(layer):
        layer.train()  # as some forward passes do
        assert not ran_fast(layer, features)
        layer.eval()
        with pytest.raises(ValueError, match="expected 4D"):
            layer(features[0])
        with pytest.raises(RuntimeError):
            layer(features[:, :1])
    layer.register_forward_pre_hook(lambda module, inputs: None)  # may change anything, as weight_norm's does
    with fast_layers(layer):
        assert not ran_fast(layer, features)


def test_in_train_mode_batchnorm_learns_its_statistics():
    layer, again, features = nn.BatchNorm2d(96), nn.BatchNorm2d(96), torch.randn(32, 96, 4, 4)
    with fast_layers(layer):
        layer(features)
    again(features)
    assert torch.equal(layer.running_mean, again.running_mean)


def test_hooks_run_and_everything_is_put_back_even_after_an_error():
    model = nn.Sequential(learned(conv()), learned(nn.BatchNorm2d(96)), learned(conv()))
    model[2].forward = nn.Identity().forward  # someone's own way
    before, seen = [dict(vars(layer)) for layer in model], []
    model[0].register_forward_hook(lambda *given: seen.append("hook"))

    def interrupted():
        with fast_layers(model):
            model(torch.randn(32, 96, 4, 4))
            raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        interrupted()
    assert seen == ["hook"]
    assert [vars(layer).keys() for layer in model] == [each.keys() for each in before]
    assert model[2].forward.__self__.__class__ is nn.Identity


def test_nothing_is_left_where_a_layer_cannot_be_read():
    model = nn.Sequential(learned(conv()), learned(nn.BatchNorm2d(96)), learned(nn.BatchNorm2d(96)))
    model[2].running_mean = torch.zeros(5)
    with pytest.raises(RuntimeError), fast_layers(model):
        pass
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_convolutions_leave_their_memory_to_each_other():
    model = learned(nn.Sequential(conv(), conv()))
    with fast_layers(model):
        model(torch.randn(32, 96, 4, 4))
        place = SCRATCH.empty("tiles", 1).data_ptr()
        model(torch.randn(32, 96, 4, 4))
        assert SCRATCH.empty("tiles", 1).data_ptr() == place


def residual(width=96):
    torch.manual_seed(0)
    return nn.Sequential(
        Normalize([0.5], [0.25]), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    ).to(memory_format=torch.channels_last)  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_attack_finds_the_same_images(norm, mode):
    """But for the few pixels whose gradient's sign is a matter of rounding."""
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    spec = AttackSpec.parse("pgd", Threat(norm, 0.1), {"steps": 3, "mode": mode, "random_start": False})
    found = [Adversary(residual(), spec, fast=fast)(images, labels) for fast in (False, True)]
    same = ((found[0] - found[1]).abs() < 1e-4).float().mean()
    assert same > 0.99
    assert not torch.equal(found[0], images)


def engine(**runtime):
    torch.manual_seed(1)
    images, labels = torch.rand(32, 1, 8, 8), torch.arange(32) % 3
    part = Part(images, labels)
    return Engine(
        residual(), Data(part, part, part, 3), method=create("methods", "at"),
        attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 2}),
        settings=Settings(epochs=1, batch_size=16, lr=0.01, eval_steps=2), runtime=Runtime.choose("cpu", **runtime),
    )  # fmt: skip


def test_training_attacks_with_them_and_learns_by_the_layers_as_they_are(monkeypatch):
    """Each step convolves once a pass of the attack by Winograd, and once for the loss by torch; RA likewise."""
    fast, slow = [], []
    own, forward = winograd_conv2d, nn.Conv2d.forward
    monkeypatch.setattr("at_smooth.fast_convolution.winograd_conv2d", lambda *given: fast.append(1) or own(*given))
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, *given: (self.in_channels > 1 and slow.append(1)) or forward(self, *given)
    )
    trained = engine()
    monkeypatch.setattr(trained, "_check_logits", lambda: None)
    trained.train_epoch(0)
    assert (len(fast), len(slow)) == (2 * 2, 2)  # two steps, PGD-2
    trained.accuracies(trained.model, trained.data.val)
    assert len(fast) == 2 * 2 + 2  # one batch, so small are the images
    assert len(slow) == 2 + 2  # it is judged clean and perturbed
    fast.clear()
    direct = engine(fast_layers=False)
    direct.train_epoch(0)
    direct.accuracies(direct.model, direct.data.val)
    assert not fast


def test_a_teacher_has_them_for_good_and_answers_the_same(monkeypatch):
    seen, own = [], winograd_conv2d
    monkeypatch.setattr("at_smooth.fast_convolution.winograd_conv2d", lambda *given: seen.append(1) or own(*given))
    images = torch.rand(16, 1, 8, 8)
    model = residual()
    model(torch.rand(16, 1, 8, 8))  # BatchNorm learns something
    wanted = copy.deepcopy(model).eval()(images)
    direct = Runtime.choose("cpu", fast_layers=False).teacher(copy.deepcopy(model))
    assert torch.equal(direct(images), wanted)
    assert not seen
    teacher = Runtime.choose("cpu").teacher(model)
    for each in (teacher, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        seen.clear()
        torch.testing.assert_close(each(images), wanted, rtol=1e-4, atol=1e-5)
        assert seen == [1]
    assert list(teacher.state_dict()) == list(direct.state_dict())
    (wanted_gradient,) = torch.autograd.grad(direct(images.requires_grad_()).square().sum(), images)
    gradient = torch.func.grad(lambda given: teacher(given).square().sum())(images.detach())
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)


def test_a_teacher_goes_with_what_becomes_of_it():
    images, others = torch.rand(16, 1, 8, 8), residual().state_dict()
    others = {name: value + 0.1 for name, value in others.items()}
    teacher, direct = (Runtime.choose("cpu", fast_layers=fast).teacher(residual()) for fast in (True, False))
    for each in (teacher, direct):
        each.load_state_dict(others)
        each[-1] = nn.Identity()
        each[4].register_forward_hook(lambda layer, given, output: 2 * output)
    torch.testing.assert_close(teacher(images), direct(images), rtol=1e-4, atol=1e-4)
    teacher.requires_grad_(True)(images).sum().backward()
    direct.requires_grad_(True)(images).sum().backward()
    torch.testing.assert_close(teacher[4].weight.grad, direct[4].weight.grad)


def test_a_teachers_own_way_stays():
    model = residual()
    model[4].forward = nn.Identity().forward
    assert Runtime.choose("cpu").teacher(model)[4].forward.__self__.__class__ is nn.Identity


def test_teachers_and_attacks_share_memory_in_whatever_mode_of_autograd():
    teacher = Runtime.choose("cpu").teacher(residual())
    images = torch.rand(16, 1, 8, 8)
    with SCRATCH.kept():
        with torch.inference_mode():
            first = teacher(images)
        with torch.no_grad():
            assert torch.equal(teacher(images), first)


def test_a_step_keeps_memory_for_teachers():
    places = []

    class Looking(Regularizer):
        def terms(self, step):
            places.extend(SCRATCH.empty("here", 1).data_ptr() for _ in range(2))
            return {"method": step.loss}

    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    part = Part(images, labels)
    Engine(
        residual(), Data(part, part, part, 3), method=create("methods", "at"), regularizer=Looking(),
        attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1}),
        settings=Settings(epochs=1, batch_size=16, lr=0.01, eval_steps=1), runtime=Runtime.choose("cpu"),
    ).train_epoch(0)  # fmt: skip
    assert len(places) == 2
    assert places[0] == places[1]


def test_the_same_seed_gives_the_same_bits():
    weights = []
    for _ in range(2):
        trained = engine()
        trained.train_epoch(0)
        weights.append(trained.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_recipe_can_do_without(tmp_path):
    """In L2, where rounding reaches the images; in Linf a sign seldom depends on it."""

    def trained(**fields):
        recipe = Recipe(dataset="digits", norm="L2", epochs=1, model_options={"width": 16}, device="cpu", **fields)
        run = train(recipe, out=tmp_path / str(len(fields)))
        assert f"fast_layers: {str(recipe.fast_layers).lower()}" in (run.path / "recipe.yaml").read_text()
        return torch.cat([value.flatten() for value in load_model(run.path).state_dict().values()])

    fast, direct = trained(), trained(fast_layers=False)
    assert not torch.equal(fast, direct)
    torch.testing.assert_close(fast, direct, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_it_is_compiled_once_and_finds_the_same(mode):
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    spec = AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 3, "random_start": False, "mode": mode})
    plain = Adversary(residual(), spec, fast=True)(images, labels)
    model = Runtime.choose("cpu", compile=True).compiling(residual())
    adversary = Adversary(model, spec, fast=True)
    adversary(images, labels)
    model.load_state_dict(residual().state_dict())
    with torch.compiler.set_stance("fail_on_recompile"):
        found = adversary(images, labels)
    assert ((found - plain).abs() < 1e-4).float().mean() > 0.99
