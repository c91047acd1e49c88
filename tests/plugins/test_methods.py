import math

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

import at_smooth
from at_smooth import Adversary, AttackSpec, OptionError, Run, Threat, create, train
from at_smooth.tpgd_l2 import TPGDL2

CLEAN = [[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]
PERTURBED = [[0.5, 1.0, -0.5], [1.0, 0.0, 2.0]]
#: Targets as tensors, and as the probabilities that they stand for; the favoured classes are 0 and 1.
TARGETS = {
    "hard": (torch.tensor([0, 1]), [[1, 0, 0], [0, 1, 0]]),
    "soft": (torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]), [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]),
}


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
    assert create("methods", "standard").attack(AttackSpec.parse("pgd", Threat("Linf", 0.1), {})) is at_smooth.CLEAN


def given(logits):
    """Images that the model below maps to these logits."""
    return torch.tensor(logits)[:, :, None, None]


def softmax(logits):
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(target, logits):
    return -sum(t * math.log(p) for t, p in zip(target, softmax(logits), strict=True))


def divergence(clean, perturbed):
    """KL(f(x) || f(x + d))."""
    p, q = softmax(clean), softmax(perturbed)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("beta", [0, 6, 2.5])
def test_trades_is_eq_5(beta, kind):
    targets, probabilities = TARGETS[kind]
    loss, logits = create("methods", "trades", {"beta": beta}).loss(
        nn.Flatten(), given(CLEAN), given(PERTURBED), targets
    )
    expected = [
        cross_entropy(target, clean) + beta * divergence(clean, perturbed)
        for target, clean, perturbed in zip(probabilities, CLEAN, PERTURBED, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert logits.tolist() == PERTURBED


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("beta", [0, 5, 2.5])
def test_mart_is_its_papers_eq_11(beta, kind):
    targets, probabilities = TARGETS[kind]
    loss, logits = create("methods", "mart", {"beta": beta}).loss(nn.Flatten(), given(CLEAN), given(PERTURBED), targets)
    expected = []
    for target, label, clean, perturbed in zip(probabilities, (0, 1), CLEAN, PERTURBED, strict=True):
        rival = max(p for k, p in enumerate(softmax(perturbed)) if k != label)
        boosted = cross_entropy(target, perturbed) - math.log(1 - rival)
        expected.append(boosted + beta * divergence(clean, perturbed) * (1 - softmax(clean)[label]))
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert logits.tolist() == PERTURBED


@pytest.mark.parametrize(("name", "beta"), [("trades", 6), ("mart", 5)])
def test_betas_default_is_the_methods_own(name, beta):
    assert create("methods", name).beta == beta


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_a_negative_beta_is_refused(name):
    with pytest.raises(OptionError, match=f"method {name}: beta: .*greater than or equal to 0"):
        create("methods", name, {"beta": -1})


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_the_loss_stays_finite_where_the_model_is_certain_and_wrong(name):
    logits = nn.Parameter(torch.tensor([[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0]]))
    loss, _ = create("methods", name).loss(
        lambda images: logits * images.mean(),
        torch.ones(2, 1, 1, 1),
        torch.full((2, 1, 1, 1), -1.0),
        torch.tensor([1, 0]),
    )
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_both_passes_teach_the_student(name):
    images = [torch.rand(4, 1, 2, 2).requires_grad_() for _ in range(2)]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    create("methods", name).loss(network, *images, torch.tensor([0, 1, 2, 0]))[0].backward()
    assert all(each.grad.abs().sum() > 0 for each in images)


def attacked(name, threat, model, images, method="at", seed=3, **options):
    """What a method trains on: the attack of that name, on a stream of its own."""
    wanted = AttackSpec.parse(name, threat, {"mode": "eval", **options})
    adversary = Adversary(model, create("methods", method).attack(wanted))
    torch.manual_seed(seed)
    return adversary(images, torch.arange(len(images)) % 3)


def direct(attack, images, seed=3):
    torch.manual_seed(seed)
    return attack(images, torch.arange(len(images)) % 3)


@pytest.fixture
def curved():
    """A network whose loss is not linear, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "eps", "step"), [("Linf", 8 / 255, 7 / 255), ("L2", 128 / 255, 15 / 255)])
def test_fgsm_takes_the_papers_one_step(norm, eps, step):
    spec = AttackSpec.parse("fgsm", Threat(norm, eps), {})
    assert (spec.steps, spec.random_start) == (1, True)
    assert spec.step_size == pytest.approx(step, rel=1e-12)


@pytest.mark.parametrize("steps", [0, 2])
def test_fgsm_of_another_number_of_steps_is_refused(steps):
    with pytest.raises(OptionError, match="attack fgsm: steps: "):
        AttackSpec.parse("fgsm", Threat("Linf", 0.1), {"steps": steps})


def test_fgsm_is_torchattacks_fast_fgsm(curved, images):
    torch.manual_seed(3)
    expected = torchattacks.FFGSM(curved, 0.1, 0.7 / 8)(images, torch.arange(6) % 3)
    wanted = AttackSpec.parse("fgsm", Threat("Linf", 0.1), {"mode": "eval"})
    torch.manual_seed(3)
    torch.randn_like(images)  # FFGSM draws normal noise and writes its uniform start over it
    found = Adversary(curved, wanted)(images, torch.arange(6) % 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_fgsm_in_l2_is_one_step_of_torchattacks_pgd(curved, images):
    expected = direct(torchattacks.PGDL2(curved, 0.5, 0.5 * 15 / 128, 1, random_start=True), images)
    assert torch.equal(attacked("fgsm", Threat("L2", 0.5), curved, images), expected)


def test_trades_in_linf_is_torchattacks_tpgd(curved, images):
    expected = direct(torchattacks.TPGD(curved, 0.1, 0.03, 4), images)
    found = attacked("pgd", Threat("Linf", 0.1), curved, images, "trades", steps=4, step_size=0.03)
    assert torch.equal(found, expected)
    assert not torch.equal(found, attacked("pgd", Threat("Linf", 0.1), curved, images, steps=4, step_size=0.03))


def test_trades_in_l2_is_our_tpgd(curved, images):
    found = attacked("pgd", Threat("L2", 0.5), curved, images, "trades", steps=4, step_size=0.2)
    assert torch.equal(found, direct(TPGDL2(curved, 0.5, 0.2, 4), images))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_trades_on_fgsm_is_one_step(curved, images, norm):
    threat = Threat(norm, 0.2)
    size = AttackSpec.parse("fgsm", threat, {}).step_size
    expected = attacked("pgd", threat, curved, images, "trades", steps=1, step_size=size)
    assert torch.equal(attacked("fgsm", threat, curved, images, "trades"), expected)


def lengths(delta):
    return delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_tpgd_in_l2_stays_in_the_ball_and_in_the_images_range(curved, images, steps):
    images = (images * 3 - 1).clamp(0, 1)  # many pixels at 0 and at 1
    found = direct(TPGDL2(curved, 0.3, 1.0, steps), images)
    assert lengths(found - images).max() <= 0.3 * (1 + 1e-5)
    assert found.min() >= 0
    assert found.max() <= 1


def test_tpgd_in_l2_finds_a_linear_models_worst_direction():
    """Two classes: the divergence depends on the difference of the logits alone, so it grows along their weights'."""
    rng = torch.Generator().manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images = 0.3 + 0.4 * torch.rand(8, 1, 4, 4, generator=rng)  # the ball stays inside [0, 1]
    with torch.no_grad():
        linear[1].weight.copy_(torch.randn(2, 16, generator=rng))
        towards = linear[1].weight[1] - linear[1].weight[0]
    delta = direct(TPGDL2(linear, 0.2, 0.05, 100), images) - images
    torch.testing.assert_close(lengths(delta), torch.full((8,), 0.2), rtol=1e-3, atol=0)
    cosine = F.cosine_similarity(delta.flatten(1), towards[None])
    torch.testing.assert_close(cosine.abs(), torch.ones(8), rtol=0, atol=1e-4)


def test_tpgd_in_l2_increases_the_divergence_with_every_few_steps(curved, images):
    def reached(steps):
        logits, attacked_logits = curved(images), curved(direct(TPGDL2(curved, 0.5, 0.1, steps), images))
        return F.kl_div(attacked_logits.log_softmax(1), logits.softmax(1), reduction="sum").item()

    assert reached(0) < reached(2) < reached(10)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L2", 0.0)])
def test_the_divergences_attack_survives_a_model_without_gradient(norm, eps, level):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.zeros_(flat[1].weight)
    images = torch.full((4, 1, 4, 4), level)
    found = attacked("pgd", Threat(norm, eps), flat, images, "trades")
    assert found.isfinite().all()
    torch.testing.assert_close(found, images, rtol=0, atol=min(eps, 0.01))  # nowhere to go from the noise


def test_tpgd_in_l2_with_an_empty_ball_moves_nothing(curved, images):
    torch.testing.assert_close(direct(TPGDL2(curved, 0.0, 0.1, 3), images), images, rtol=0, atol=0)


def test_any_torchattacks_class_can_be_trained_on(curved, images):
    found = attacked("torchattacks:MIFGSM", Threat("Linf", 0.1), curved, images, steps=5)
    assert torch.equal(found, direct(torchattacks.MIFGSM(curved, 0.1, 0.1 / 4, steps=5), images))


def test_a_torchattacks_class_of_any_norm_gets_the_threats(curved, images):
    threat, options = Threat("L2", 0.5), {"steps": 3, "seed": 0}
    expected = direct(torchattacks.APGD(curved, "L2", 0.5, **options), images)
    assert torch.equal(attacked("torchattacks:APGD", threat, curved, images, **options), expected)


def test_a_run_records_the_torchattacks_class_and_its_options(tiny, tmp_path):
    recipe = tiny(attack="torchattacks:MIFGSM", attack_options={"steps": 5}, epochs=1)
    run = Run(train(recipe, tmp_path / "run").path)
    assert run.recipe == recipe
    assert (run.recipe.attack, run.recipe.attack_options["steps"]) == ("torchattacks:MIFGSM", 5)


@pytest.mark.parametrize(
    ("name", "norm", "options", "words"),
    [
        ("torchattacks:MIFSGM", "Linf", {}, "no attack 'MIFSGM'.*did you mean 'MIFGSM'.*Attacks: .*PGDL2"),
        ("torchattacks:attack", "Linf", {}, "no attack 'attack'"),
        ("torchattacks:MIFGSM", "Linf", {"stesp": 3}, "MIFGSM has no option stesp. Options: mode, alpha, steps, decay"),
        ("torchattacks:MIFGSM", "Linf", {"eps": 0.3}, "MIFGSM has no option eps"),
        ("torchattacks:MIFGSM", "Linf", {"model": 1}, "MIFGSM has no option model"),
        ("torchattacks:MIFGSM", "L2", {}, "MIFGSM measures Linf, the threat is L2.* --attack or --norm"),
        ("torchattacks:PGDL2", "Linf", {}, "PGDL2 measures L2, the threat is Linf"),
        ("torchattacks:MIFGSM", "Linf", {"mode": "tain"}, "torchattacks:MIFGSM: mode: "),
    ],
)
def test_what_torchattacks_has_not_is_refused(name, norm, options, words):
    with pytest.raises(OptionError, match=words):
        AttackSpec.parse(name, Threat(norm, 0.1), options)


def test_trades_needs_an_attack_that_can_maximise_the_divergence():
    wanted = AttackSpec.parse("torchattacks:MIFGSM", Threat("Linf", 0.1), {})
    with pytest.raises(OptionError, match=r"torchattacks:MIFGSM has its own objective; .*--attack pgd"):
        create("methods", "trades").attack(wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "trades", "attack": "torchattacks:MIFGSM", "attack_options": {}},
        {"attack": "torchattacks:MIFGSM", "attack_options": {"steps": "many"}},
    ],
    ids=["objective", "option"],
)
def test_an_attack_that_cannot_be_used_leaves_no_run_behind(tiny, tmp_path, changes):
    with pytest.raises(OptionError):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
