import pytest
import torch
import torch.nn.functional as F
from torch import nn

from at_smooth import AttackSpec, Threat, create


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("name", "sees"), [("at", "perturbed"), ("standard", "clean")])
def test_the_loss_is_cross_entropy_on_what_the_method_sees(model, name, sees, soft):
    images = {"clean": torch.rand(5, 1, 2, 2), "perturbed": torch.rand(5, 1, 2, 2)}
    targets = torch.rand(5, 3).softmax(1) if soft else torch.tensor([0, 2, 1, 0, 2])
    loss, logits = create("methods", name).loss(model, images["clean"], images["perturbed"], targets)
    expected = model(images[sees])
    weights = targets if soft else F.one_hot(targets, 3)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, -(weights * expected.log_softmax(1)).sum(1).mean())
    assert loss.requires_grad


def test_at_trains_on_the_attack_that_is_wanted():
    wanted = AttackSpec.parse("pgd", Threat("L2", 0.5), {"steps": 3})
    assert create("methods", "at").attack(wanted) == wanted


def test_standard_training_attacks_nothing():
    assert create("methods", "standard").attack(AttackSpec.parse("pgd", Threat("Linf", 0.1), {})) is None
