import copy
import math

import pytest
import torch
from pydantic import PrivateAttr
from torch import nn

from at_smooth import (
    AttackSpec,
    DivergedError,
    Engine,
    Observer,
    OptionError,
    Regularizer,
    Runtime,
    Settings,
    Threat,
    create,
)
from at_smooth.interfaces import Batch
from at_smooth.measuring import COLUMNS
from at_smooth.step import TrainingLoss


class Network(nn.Module):
    """A module of the user's own: convolution, dropout, BatchNorm."""

    def __init__(self, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.conv(images)).relu()).flatten(1))


def network(channels=1):
    torch.manual_seed(0)
    return Network(channels)


def spec(norm="Linf", eps=0.1, **options):
    return AttackSpec.parse("pgd", Threat(norm, eps), {"steps": 2, **options})


def settings(**changes):
    return Settings(**{"epochs": 3, "batch_size": 8, "eval_steps": 2, "test_every": 0, "lr": 0.05, **changes})


@pytest.fixture
def engine(toy_data):
    """Makes an engine on toy images."""

    def make(model=None, *, cls=Engine, method="at", channels=1, attack=None, precision="fp32", **options):
        changes = {key: options.pop(key) for key in list(options) if key in Settings.model_fields}
        return cls(
            model or network(channels),
            toy_data(channels=channels),
            method=create("methods", method),
            attack=attack or spec(),
            settings=settings(**changes),
            runtime=Runtime.choose("cpu", precision),
            **options,
        )

    return make


def weights(engine):
    return copy.deepcopy(engine.model.state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("method", ["at", "standard"])
def test_it_trains_any_module_in_any_norm(engine, method, norm, channels):
    trained = engine(method=method, attack=spec(norm), channels=channels, epochs=12, test_every=1)
    rows = trained.fit()
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["test_sa"] > 60  # three classes
    assert rows[-1]["test_ra"] <= rows[-1]["test_sa"]
    assert list(rows[-1]) == COLUMNS


def test_a_bare_linear_model_trains(engine):
    rows = engine(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))).fit()
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_same_seed_gives_the_same_weights(engine):
    one, same_seed, other = engine(), engine(), engine(seed=1)
    for each in (one, same_seed, other):
        each.fit()
    assert same(weights(one), weights(same_seed))
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize(
    "changes", [{"test_every": 1}, {"validate_every": 3}, {"eval_steps": 5}, {"smoother": "swa"}], ids=str
)
def test_looking_does_not_change_training(engine, changes):
    if "smoother" in changes:
        changes = {"smoother": create("smoothers", "swa", {"start": 0})}
    left_alone, looked_at = engine(), engine(**changes)
    left_alone.fit()
    looked_at.fit()
    assert same(weights(left_alone), weights(looked_at))


def test_one_update_is_sgd_on_the_methods_loss(engine):
    sgd = {"lr": 0.1, "weight_decay": 0.01, "milestones": ()}
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    trained = engine(model, method="standard", epochs=1, batch_size=64, **sgd)
    copied = copy.deepcopy(trained.model)
    images, labels = trained.data.train
    nn.functional.cross_entropy(copied(images), labels).backward()
    row = trained.fit()[0]
    for before, after in zip(copied.parameters(), trained.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * (before.grad + 0.01 * before))
    with torch.no_grad():
        logits = copied(images)
    assert row["train_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["train_acc"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_sa_and_ra_of_a_linear_model_are_known(engine, norm, dual):
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.normal_(generator=rng)
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))  # the boundary passes through grey
    measured = engine(model, attack=spec(norm, 0.02, step_size=0.01), eval_steps=60)
    images = 0.2 + 0.6 * torch.rand(200, 1, 4, 4, generator=rng)
    part = type(measured.data.val)(images, torch.arange(200) % 2)
    with torch.no_grad():
        logits = model(images)
        margin = logits.gather(1, part.labels[:, None])[:, 0] - logits.gather(1, 1 - part.labels[:, None])[:, 0]
        worst = 0.02 * (model[1].weight[0] - model[1].weight[1]).norm(p=dual)
    expected = [100 * (margin > bound).float().mean().item() for bound in (0, worst)]
    assert expected[0] > expected[1] > 0
    assert list(measured.accuracies(model, part)) == pytest.approx(expected)


def test_measuring_leaves_modes_and_random_streams_alone(engine):
    measured = engine()
    measured.model.norm.eval()
    modes = [module.training for module in measured.model.modules()]
    torch.manual_seed(5)
    first = measured.accuracies(measured.model, measured.data.val)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert [module.training for module in measured.model.modules()] == modes
    assert measured.accuracies(measured.model, measured.data.val) == first


def test_other_weights_are_measured_without_taking_them(engine):
    trained = engine()
    initial, before = weights(trained), trained.accuracies(trained.model, trained.data.val)
    trained.fit()
    after = weights(trained)
    assert trained.accuracies_of(initial, trained.data.val) == before
    assert same(weights(trained), after)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_is_frozen_stays_frozen(engine, mode):
    model = network()
    for module in (model.conv, model.norm):
        module.requires_grad_(False)
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    trained = engine(model, attack=spec(mode=mode))
    trained.fit()
    changed = {name for name, tensor in weights(trained).items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert trained.model.training
    assert not trained.model.norm.training
    assert not any(parameter.requires_grad for parameter in trained.model.conv.parameters())


def test_gradients_reach_the_student_only(engine):
    teachers = []

    class Lent:
        def get(self, method, path=None):
            teachers.append(network().eval())
            return teachers[-1]

    trained = engine(regularizer=create("regularizers", "kd-std-adv"), teachers=Lent(), epochs=1)
    before = weights(trained)
    trained.fit()
    assert len(teachers) == 2
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())
    assert all(same(teacher.state_dict(), network().state_dict()) for teacher in teachers)
    assert not same(weights(trained), before)


class Borrow(Regularizer):
    """Keeps the teacher that it is given."""

    _teacher: nn.Module = PrivateAttr()

    def setup(self, teachers):
        self._teacher = teachers.get("at")


def test_a_bare_engine_trains_its_teachers_on_the_spot(engine):
    student, alone = engine(regularizer=Borrow(), method="standard"), engine(method="at")
    student.fit()
    alone.fit()
    teacher = student.regularizer._teacher
    assert same(teacher.state_dict(), alone.best["raw"].weights)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_asking_for_a_teacher_does_not_change_the_student(engine):
    student, alone = engine(regularizer=Borrow(), method="standard"), engine(method="standard")
    student.fit()
    alone.fit()
    assert same(weights(student), weights(alone))


class Explosive(Regularizer):
    """Goes off halfway."""

    def terms(self, step):
        return {"method": step.loss * (1 if step.progress < 0.5 else float("nan"))}


def test_a_loss_that_is_not_finite_ends_it(engine):
    exploding = engine(regularizer=Explosive(), epochs=4)
    with pytest.raises(DivergedError, match=r"nan at epoch 3.*lower --lr") as caught:
        exploding.fit()
    assert caught.value.exit_code == 3
    assert len(exploding.history) == 2
    assert all(tensor.isfinite().all() for tensor in exploding.model.state_dict().values())


class Scripted(Engine):
    """Measures what it is told to: SA is highest in the second epoch, RA in the third and again in the fourth."""

    def accuracies(self, model, part):
        return [(10.0, 1.0), (40.0, 2.0), (30.0, 9.0), (20.0, 9.0)][self.epoch - 1]


@pytest.mark.parametrize(("method", "epoch"), [("standard", 2), ("at", 3)])
def test_the_best_epoch_is_by_sa_without_an_attack_and_else_by_ra(engine, method, epoch):
    snapshots = {}

    class Keep(Observer):
        def epoch_ended(self, engine, row, improved):
            snapshots[row["epoch"]] = {"raw": weights(engine), "smoothed": engine.smoother.smoothed()}
            snapshots[row["epoch"]]["smoothed"] = copy.deepcopy(snapshots[row["epoch"]]["smoothed"].state_dict())

    trained = engine(cls=Scripted, method=method, epochs=4, smoother=create("smoothers", "swa", {"start": 0}))
    trained.fit(Keep())
    for kind, best in trained.best.items():
        assert best.row["epoch"] == epoch
        assert same(best.weights, snapshots[epoch][kind])


@pytest.mark.parametrize(
    ("every", "measured"), [(0, []), (1, list(range(1, 13))), (4, [4, 8, 9, 10, 11, 12]), (50, [8, 9, 10, 11, 12])]
)
def test_the_test_set_is_measured_now_and_then_and_in_the_last_five(engine, every, measured):
    rows = engine(epochs=12, test_every=every, eval_steps=0).fit()
    assert [row["epoch"] for row in rows if row["test_ra"] is not None] == measured
    assert [row["epoch"] for row in rows if row["test_sa"] is not None] == measured


def test_validation_is_measured_now_and_then_and_at_the_end(engine):
    rows = engine(epochs=5, validate_every=2).fit()
    assert [row["epoch"] for row in rows if row["val_ra"] is not None] == [2, 4, 5]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"milestones": (3, 5)}, [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]),
        ({"lr_schedule": "cosine"}, [(1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]),
    ],
    ids=str,
)
def test_the_learning_rate_follows_its_schedule(engine, changes, rates):
    rows = engine(epochs=8, eval_steps=0, **changes).fit()
    assert [row["lr"] for row in rows] == pytest.approx([0.05 * rate for rate in rates])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_short_training_begins_at_the_full_rate(engine, epochs):
    assert engine(epochs=epochs, eval_steps=0).fit()[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("changes", "first"), [({}, 2), ({"milestones": (3, 5)}, 3), ({"lr_schedule": "cosine"}, None)], ids=str
)
def test_the_schedule_says_when_the_rate_first_drops(engine, changes, first):
    schedule = engine(epochs=8, **changes).schedule
    assert (schedule.epochs, schedule.first_decay) == (8, first)
    assert schedule.steps_per_epoch == 5  # 36 images by 8, four left over


@pytest.mark.parametrize("milestones", [(0.0,), (-1,), (0.75, 0.25), (float("nan"),), (float("inf"),)], ids=str)
def test_milestones_are_positive_and_rise(milestones):
    with pytest.raises(ValueError, match="milestones"):
        Settings(milestones=milestones)


def test_bf16_trains_with_a_finite_loss_and_full_precision_weights(engine):
    trained = engine(precision="bf16", epochs=4)
    rows = trained.fit()
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(trained).values())
    reference = engine(epochs=4)
    reference.fit()
    assert not same(weights(trained), weights(reference))  # or it was not bf16


def test_swa_averages_the_epochs_and_its_batchnorm_fits_the_data(engine):
    epochs = []

    class Keep(Observer):
        def epoch_ended(self, engine, row, improved):
            epochs.append(weights(engine))

    trained = engine(epochs=4, smoother=create("smoothers", "swa"))  # the first decay is after epoch 1
    rows = trained.fit(Keep())
    smoothed = trained.smoother.smoothed()
    for name, parameter in smoothed.named_parameters():
        torch.testing.assert_close(parameter, sum(epoch[name] for epoch in epochs[1:]) / 3)
    batches = [smoothed.conv(batch.clean) for batch in trained.data.train_batches(3, 8, "batchnorm")]
    mean = sum(len(batch) * batch.mean((0, 2, 3)) for batch in batches) / trained.data.train.n
    torch.testing.assert_close(smoothed.norm.running_mean, mean)
    assert [row["smoothed_val_ra"] is not None for row in rows] == [False, True, True, True]


def test_the_loss_sees_what_a_regularizer_is_promised():
    seen = []

    class Look(Regularizer):
        def terms(self, step):
            seen.append(step)
            return {"method": step.loss}

    batch = Batch(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 3, 9, 1]))
    perturbed = (batch.clean + 0.1).clamp(0, 1)
    model = network().eval()
    loss = TrainingLoss(model, create("methods", "at"), Look(), 3)
    terms, logits = loss(batch, perturbed, 0.25)
    step = seen[0]
    assert torch.equal(step.clean, batch.clean)
    assert torch.equal(step.perturbed, perturbed)
    assert torch.equal(step.indices, batch.indices)
    assert step.progress == 0.25
    torch.testing.assert_close(logits, model(perturbed))
    torch.testing.assert_close(terms["method"], nn.functional.cross_entropy(model(perturbed), batch.labels))


@pytest.mark.parametrize(
    ("regularizer", "smoother"), [("none", "none"), ("none", "swa"), ("none", "iswa"), ("kd-std-adv", "none")]
)
def test_a_restored_engine_continues_exactly(engine, regularizer, smoother):
    class Stop(Observer):
        def epoch_ended(self, engine, row, improved):
            if row["epoch"] == 2:
                raise KeyboardInterrupt

    def make():
        plugins = {"regularizer": create("regularizers", regularizer), "smoother": create("smoothers", smoother)}
        return engine(epochs=4, test_every=1, **plugins)

    whole, begun, continued = make(), make(), make()
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        begun.fit(Stop())
    continued.restore(copy.deepcopy(begun.state()), {name: best.weights for name, best in begun.best.items()})
    continued.fit()
    assert same(weights(whole), weights(continued))
    assert [{**row, "seconds": 0} for row in whole.history] == [{**row, "seconds": 0} for row in continued.history]
    for kind, best in whole.best.items():
        assert same(best.weights, continued.best[kind].weights)


def test_a_model_without_one_logit_a_class_is_refused_before_it_trains(engine):
    trained = engine(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    with pytest.raises(OptionError, match=r"gives \(2, 2\); it should give logits \(2, 3\)"):
        trained.fit()


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(1)])
def test_a_model_that_gives_probabilities_is_refused_before_it_trains(engine, last):
    trained = engine(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), last))
    with pytest.raises(OptionError, match=r"gives probabilities; .* Leave its last (sigmoid|softmax) out"):
        trained.fit()
