import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from at_smooth import OptionError, Step, create
from at_smooth.interfaces import total
from at_smooth_plugins.regularizers.label_smoothing import smoothed_labels
from at_smooth_plugins.regularizers.self_distillation import distillation_loss
from at_smooth_plugins.regularizers.tf_kd import virtual_teacher

LABELS = torch.tensor([0, 2, 1, 2])


def logits(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def step(student, labels=LABELS, perturbed=None):
    clean = torch.zeros(4, 1, 2, 2)
    perturbed = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(9)) if perturbed is None else perturbed
    return Step(clean, perturbed, labels, torch.arange(4), student, F.cross_entropy(student, labels), 0.5)


class Desk:
    """Teachers made up beforehand; remembers who was asked for."""

    def __init__(self):
        torch.manual_seed(0)
        self.models = {name: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval() for name in ("standard", "at")}
        self.asked = {}

    def get(self, method, path=None):
        self.asked[method] = path
        return self.models[method]


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 5])
def test_kd_is_softened_cross_entropy_times_the_temperature_squared(temperature):
    student, teacher = logits(0), logits(1)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in t) for x in t]
        log_q = [x / temperature - math.log(sum(math.exp(y / temperature) for y in s)) for x in s]
        expected -= sum(a * b for a, b in zip(p, log_q, strict=True)) * temperature**2 / 4
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_kd_pulls_nowhere_only_where_student_and_teacher_agree():
    for student, still in ((logits(1) + 3, True), (logits(0), False)):
        student = student.clone().requires_grad_()
        distillation_loss(student, logits(1), 2.0).backward()
        assert (student.grad.abs().max().item() < 1e-6) == still


def test_kds_gradient_keeps_its_size_as_the_temperature_grows():
    def gradient(temperature):
        student = logits(0).requires_grad_()
        distillation_loss(student, logits(1), temperature).backward()
        return student.grad

    torch.testing.assert_close(gradient(1e3), gradient(1e2), rtol=0.05, atol=1e-3)


def test_kd_is_in_full_precision():
    loss = distillation_loss(logits(0).bfloat16(), logits(1).bfloat16(), 2.0)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "adv", "std", "temperature"),
    [
        ("kd-std-adv", {}, 0.5, 0.25, 2),
        ("kd-std-adv", {"lambda_adv": 0.2, "lambda_std": 0.1, "temperature": 4}, 0.2, 0.1, 4),
        ("kd-std-adv", {"lambda_adv": 0}, 0, 0.25, 2),
        ("kd-adv", {}, 0.5, 0, 2),
        ("kd-std", {}, 0, 0.25, 2),
        ("kd-std-adv", {"lambda_adv": 0, "lambda_std": 0}, 0, 0, 2),
    ],
)
def test_self_distillation_is_eq_1(name, options, adv, std, temperature):
    desk, regularizer = Desk(), create("regularizers", name, options)
    regularizer.setup(desk)
    now = step(logits(0))
    terms = regularizer.terms(now)
    kd = {
        method: distillation_loss(now.logits, model(now.perturbed), temperature)
        for method, model in desk.models.items()
    }
    torch.testing.assert_close(total(terms), (1 - adv - std) * now.loss + adv * kd["at"] + std * kd["standard"])
    assert set(desk.asked) == {method for method, weight in (("at", adv), ("standard", std)) if weight}


def test_teachers_see_the_perturbed_images_and_get_no_gradient():
    desk, regularizer = Desk(), create("regularizers", "kd-std-adv")
    regularizer.setup(desk)
    weight = torch.ones(4, 3, requires_grad=True)
    black, white = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    one, other = (total(regularizer.terms(step(logits(0) * weight, perturbed=each))) for each in (black, white))
    assert one != other
    one.backward()
    assert weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for model in desk.models.values() for parameter in model.parameters())


def test_a_teacher_brought_along_is_asked_for(tmp_path):
    desk = Desk()
    create("regularizers", "kd-std-adv", {"adv_teacher": str(tmp_path)}).setup(desk)
    assert desk.asked == {"standard": None, "at": tmp_path}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda_adv": 0.8}, "lambda_adv . lambda_std is 1.05"),
        ({"lambda_adv": -0.1}, "lambda_adv: "),
        ({"lambda_std": 1.1}, "lambda_std: "),
        ({"temperature": 0}, "temperature: "),
    ],
)
def test_weights_that_eq_1_has_no_room_for_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        create("regularizers", "kd-std-adv", options)


@pytest.mark.parametrize("alpha", [0, 0.1, 1])
def test_label_smoothing_mixes_in_the_uniform_distribution(alpha):
    targets = create("regularizers", "label-smoothing", {"alpha": alpha}).targets(LABELS, 3)
    expected = torch.full((4, 3), alpha / 3)
    expected[torch.arange(4), LABELS] = 1 - alpha + alpha / 3
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets, smoothed_labels(LABELS, 3, alpha))


def test_label_smoothing_is_pytorchs():
    student = logits(0)
    torch.testing.assert_close(
        F.cross_entropy(student, smoothed_labels(LABELS, 3, 0.2)), F.cross_entropy(student, LABELS, label_smoothing=0.2)
    )


def test_none_keeps_hard_labels_and_the_methods_loss():
    regularizer, now = create("regularizers", "none"), step(logits(0))
    assert torch.equal(regularizer.targets(LABELS, 3), LABELS)
    assert torch.equal(total(regularizer.terms(now)), now.loss)


@pytest.mark.parametrize("temperature", [0.5, 20])
def test_the_virtual_teacher_is_its_softened_design(temperature):
    teacher = virtual_teacher(LABELS, 3, 0.9, temperature)
    high, low = math.exp(0.9 / temperature), math.exp(0.05 / temperature)
    expected = torch.full((4, 3), low / (high + 2 * low))
    expected[torch.arange(4), LABELS] = high / (high + 2 * low)
    torch.testing.assert_close(teacher, expected)


def test_tf_kd_adds_the_divergence_from_the_virtual_teacher():
    now = step(logits(0))
    regularizer = create("regularizers", "tf-kd", {"alpha": 0.3, "correct": 0.9, "temperature": 2})
    teacher = virtual_teacher(LABELS, 3, 0.9, 2)
    divergence = (teacher * (teacher.log() - now.logits.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(total(regularizer.terms(now)), 0.7 * now.loss + 0.3 * divergence)


def test_tf_kd_asks_nothing_of_a_student_that_equals_the_teacher():
    student = virtual_teacher(LABELS, 3, 0.99, 20.0).log()
    terms = create("regularizers", "tf-kd").terms(step(student))
    assert terms["tf-kd"].item() == pytest.approx(0, abs=1e-6)
