import math

import pytest
import torch
import torchattacks
from torch import nn

from at_smooth import Adversary, AttackSpec, OptionError, Threat
from at_smooth.threat import format_pixels, parse_pixels

NORMS = ["Linf", "L2"]
RADII = {"Linf": 0.1, "L2": 0.5}


def adversary(model, norm="Linf", eps=None, **options):
    return Adversary(model, AttackSpec.parse("pgd", Threat(norm, RADII[norm] if eps is None else eps), options))


def size(delta, norm):
    return delta.flatten(1).norm(p=math.inf if norm == "Linf" else 2, dim=1)


def linear(weight):
    """A linear classifier, whose worst perturbation is known."""
    classes, *shape = weight.shape
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
    with torch.no_grad():
        model[1].weight.copy_(weight.flatten(1))
    return model


def network(channels=1):
    """Convolution, BatchNorm, dropout."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)
    )


def batch(n=6, channels=1):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, 4, 4, generator=rng), torch.arange(n) % 3


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), ("1e-2", 0.01), (0.3, 0.3), (1, 1)])
def test_pixels_are_read_from_numbers_and_fractions(text, value):
    assert parse_pixels(text) == value


@pytest.mark.parametrize("text", ["", "junk", "8/", "/255", "1/0", "8/255/2", "8:255"])
def test_pixels_that_are_neither_are_refused(text):
    with pytest.raises(ValueError, match="neither a number nor a fraction"):
        parse_pixels(text)


@pytest.mark.parametrize(("value", "text"), [(8 / 255, "8/255"), (128 / 255, "128/255"), (0.2, 0.2), (0.0, 0.0)])
def test_pixels_are_written_as_people_write_them(value, text):
    assert format_pixels(value) == text
    assert parse_pixels(format_pixels(value)) == value


@pytest.mark.parametrize(("norm", "eps", "step"), [("Linf", 8 / 255, 2 / 255), ("L2", 128 / 255, 15 / 255)])
def test_the_default_step_is_the_papers(norm, eps, step):
    spec = AttackSpec.parse("pgd", Threat(norm, eps), {})
    assert spec.step_size == pytest.approx(step, rel=1e-12)
    assert (spec.steps, spec.random_start) == (10, True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gdp", {}, "no attack 'gdp'"),
        ("pgd", {"stesp": 3}, "stesp: there is no such option"),
        ("pgd", {"steps": -1}, "steps: .*greater than or equal to 0"),
        ("pgd", {"step_size": "wide"}, "step_size: .*wide"),
        ("pgd", {"mode": "tain"}, "mode: .*'train' or 'eval'"),
        ("pgd", {"threat": 3}, "threat"),
    ],
)
def test_wrong_attack_options_are_refused(name, options, words):
    with pytest.raises(OptionError, match=words):
        AttackSpec.parse(name, Threat("Linf", 0.1), options)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_models_worst_perturbation_is_found(norm, random_start):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 1, 4, 4, generator=rng)
    images = 0.3 + 0.4 * torch.rand(5, 1, 4, 4, generator=rng)  # the ball stays inside [0, 1]
    labels = torch.tensor([0, 1, 1, 0, 1])
    towards = (weight.flip(0) - weight)[labels]
    eps = 0.2
    worst = towards.sign() if norm == "Linf" else towards / size(towards, "L2")[:, None, None, None]

    attack = adversary(linear(weight), norm, eps, steps=200, step_size=0.05, random_start=random_start)
    torch.testing.assert_close(attack(images, labels) - images, eps * worst, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "direct"), [("Linf", torchattacks.PGD), ("L2", torchattacks.PGDL2)])
def test_it_is_torchattacks_own_attack(norm, direct, channels):
    model = network(channels).eval()
    images, labels = batch(channels=channels)
    torch.manual_seed(3)
    expected = direct(model, RADII[norm], 0.03, 4, random_start=True)(images, labels)
    torch.manual_seed(3)
    found = adversary(model, norm, steps=4, step_size=0.03, mode="eval")(images, labels)
    assert not torch.equal(found, images)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_images_may_be_channels_last(norm, channels):
    model = network(channels).eval()
    images, labels = batch(channels=channels)
    expected = adversary(model, norm, random_start=False)(images, labels)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(adversary(model, norm, random_start=False)(images, labels), expected)
    assert size(adversary(model, norm)(images, labels) - images, norm).max() <= RADII[norm] * (1 + 1e-5)


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_it_stays_in_the_ball_and_in_the_images_range(norm, steps):
    images, labels = batch(30)
    images = (images * 3 - 1).clamp(0, 1)  # many pixels at 0 and at 1
    found = adversary(network(), norm, steps=steps, step_size=1.0)(images, labels)
    assert size(found - images, norm).max() <= RADII[norm] * (1 + 1e-5)
    assert size(found - images, norm).min() > 0
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_eps_0_gives_the_clean_images(norm):
    images, labels = batch()
    assert torch.equal(adversary(network(), norm, eps=0)(images, labels), images)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_and_extreme_images_give_no_nan(norm, level, random_start):
    images, labels = torch.full((4, 1, 4, 4), level), torch.zeros(4, dtype=torch.long)
    found = adversary(linear(torch.zeros(2, 1, 4, 4)), norm, random_start=random_start)(images, labels)
    assert found.isfinite().all()
    assert random_start or torch.equal(found, images)


class Fragile(nn.Module):
    """Raises, or not, after its BatchNorm ran."""

    def __init__(self, raises):
        super().__init__()
        self.body, self.raises = network(), raises

    def forward(self, images):
        logits = self.body(images)
        if self.raises:
            raise RuntimeError("out of luck")
        return logits


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_flag_and_gradient_is_as_before(mode, raises):
    model = Fragile(raises).train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    model.body[5].weight.grad = torch.ones_like(model.body[5].weight)
    modes = {name: module.training for name, module in model.named_modules()}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        adversary(model, mode=mode)(*batch())
    except RuntimeError:
        assert raises
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {"body.5.weight"}
    assert (model.body[5].weight.grad == 1).all()


@pytest.mark.parametrize(("mode", "moves"), [("train", True), ("eval", False)])
def test_running_statistics_move_in_train_mode_only(mode, moves):
    model = network().train()
    before = model[1].running_mean.clone()
    adversary(model, mode=mode)(*batch())
    assert torch.equal(model[1].running_mean, before) != moves


def test_it_attacks_where_gradients_are_off():
    model = network().eval()
    images, labels = batch()
    expected = adversary(model, random_start=False)(images, labels)
    with torch.no_grad():
        assert torch.equal(adversary(model, random_start=False)(images, labels), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(("norm", "eps"), [("L1", 0.1), ("Linf", -1), ("Linf", "junk"), ("L2", math.inf), ("L2", None)])
def test_a_threat_that_is_none_is_refused(norm, eps):
    with pytest.raises(OptionError, match=r"norm|eps"):
        Threat(norm, eps)


def test_a_threat_may_be_written_as_a_fraction():
    assert Threat("Linf", "8/255").eps == 8 / 255


@pytest.mark.parametrize("name", ["CW", "DeepFool", "GN", "VANILA"])
def test_an_attack_without_a_radius_is_refused(name):
    with pytest.raises(OptionError, match="no radius"):
        AttackSpec.parse(f"torchattacks:{name}", Threat("L2" if name != "GN" else "Linf", 0.1), {})


@pytest.mark.parametrize("name", ["FFGSM", "MIFGSM", "PGD", "PIFGSM", "TIFGSM"])
def test_library_attacks_keep_to_the_threat(name):
    spec = AttackSpec.parse(f"torchattacks:{name}", Threat("Linf", 0.1), {})
    images = 0.3 + 0.4 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    moved = size(Adversary(model, spec)(images, torch.arange(4) % 3) - images, "Linf")
    assert moved.max() <= 0.1 + 1e-6
    assert moved.min() > 0.09


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Threat("Linf", 8), r"eps 8 is more than 1, the range of a pixel; did you mean 8/255\?"),
        (lambda: Threat("Linf", "300"), r"eps 300 is more than 1, the range of a pixel\.$"),
        (lambda: spec("pgd", step_size=2), r"pgd: step_size: 2 is more than 1, .*; did you mean 2/255\?"),
        (lambda: spec("fgsm", step_size="10"), r"fgsm: step_size: 10 .*did you mean 10/255\?"),
        (lambda: spec("torchattacks:MIFGSM", alpha=2), r"torchattacks:MIFGSM: alpha: 2 .*did you mean 2/255\?"),
        (lambda: spec("torchattacks:SPSA", delta="3"), r"delta: 3 .*did you mean 3/255\?"),
        (lambda: Threat("L2", 128).check_shape((3, 32, 32)), r"eps 128 is more than 55.43, .*3x32x32; .*mean 128/"),
        (lambda: spec("pgd", "L2", step_size=15).check_shape((1, 8, 8)), r"step_size: 15 is more than 8, .*15/255"),
    ],
)  # fmt: skip
def test_lengths_that_no_perturbation_has_are_refused(make, words):
    with pytest.raises(OptionError, match=words):
        make()


def spec(name, norm="Linf", **options):
    return AttackSpec.parse(name, Threat(norm, 0.1), options)


def test_lengths_up_to_the_largest_perturbation_are_allowed():
    assert Threat("Linf", 1).eps == 1
    Threat("L2", 8).check_shape((1, 8, 8))
    assert spec("pgd", step_size=1).step_size == 1
    assert spec("pgd", "L2", step_size=15).step_size == 15  # no image is known yet
    assert spec("torchattacks:SPSA", delta=1).lengths == {"delta": 1.0}


def test_an_attack_whose_lengths_do_not_fit_the_images_is_refused_when_it_is_called():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(2, 1, 2, 2)
    with pytest.raises(OptionError, match="eps 3 is more than 2, the largest L2 distance between two images of 1x2x2"):
        Adversary(model, AttackSpec.parse("pgd", Threat("L2", 3), {}))(images, torch.tensor([0, 1]))
