import os
import signal

import pytest
import torch
from torch import nn

from at_smooth import (
    AttackSpec,
    Data,
    DivergedError,
    Engine,
    Interrupted,
    Observer,
    Regularizer,
    Run,
    Runtime,
    Settings,
    Threat,
    checkpoint,
    create,
    train,
)
from at_smooth.divergence import all_finite
from at_smooth.progress import Silent


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(value):
    tensors = [torch.ones(3), torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor(7)]
    assert all_finite(tensors)
    assert all_finite([])
    assert all_finite([torch.full((4,), 3e38)])  # large, but finite
    tensors[1][1, 2, 3, 0] = value
    assert not all_finite(tensors)


class Explosive(Regularizer):
    """Adds a term that goes off in a step; its value is finite there if only its gradient is to be broken."""

    def terms(self, step):
        if 0.5 <= step.progress < 0.7:
            return {"method": step.loss, "bomb": self._bomb(step)}
        return {"method": step.loss}

    def _bomb(self, step):
        return step.loss.detach() * float("nan")


class BrokenGradient(Explosive):
    def _bomb(self, step):
        return (step.logits * 0).abs().sum().sqrt()  # 0, with an infinite slope


class Overflow(Explosive):
    def _bomb(self, step):
        return step.logits.sum() * 1e37


@pytest.fixture
def engine(toy_data):
    def make(regularizer, model=None, data=None, **settings):
        torch.manual_seed(0)
        model = model or nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        return Engine(
            model,
            data or toy_data(),
            method=create("methods", "at"),
            attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1}),
            regularizer=regularizer,
            settings=Settings(**{"epochs": 4, "batch_size": 18, "eval_steps": 1, "test_every": 0, **settings}),
            runtime=Runtime.choose("cpu"),
        )

    return make


@pytest.mark.parametrize(
    ("regularizer", "settings", "step", "words"),
    [
        (Explosive(), {}, 1, "the loss is nan at epoch 3, step 1 .*bomb nan.*the term 'bomb' alone"),
        (BrokenGradient(), {}, 1, "the gradients are not finite at epoch 3, step 1 .*Likely cause"),
        (
            Overflow(),
            {"lr": 1e3},
            2,
            "the weights are not finite since the update before, at epoch 3, step 2 .*too high",
        ),
    ],
)
def test_it_stops_at_that_step_and_says_why(engine, regularizer, settings, step, words):
    steps = []

    class Count(Observer):
        def stepped(self, engine):
            steps.append(engine.step)

    exploding = engine(regularizer, **settings)
    with pytest.raises(DivergedError, match=words) as caught:
        exploding.fit(Count())
    assert len(steps) == 4 + step - 1  # two epochs of two
    assert caught.value.exit_code == 3
    dump = caught.value.dump
    assert (dump["epoch"], dump["step"]) == (3, step)
    assert dump["clean"].shape == dump["perturbed"].shape == (18, 1, 4, 4)
    assert len(dump["indices"]) == len(dump["labels"]) == len(dump["logits"]) == 18
    assert dump["model"].keys() == exploding.model.state_dict().keys()


class OverflowAtTheEnd(Regularizer):
    """In the last step of an epoch the gradients are finite and larger than the rate can bear."""

    def terms(self, step):
        return {"method": step.loss, "push": step.logits.mean() * (3e38 if step.progress == 0.875 else 0)}


def test_weights_that_the_last_step_of_an_epoch_broke_are_neither_measured_nor_saved(engine):
    seen = []

    class Watch(Observer):
        def measured(self, engine):
            seen.append(engine.epoch)

    overflowing = engine(OverflowAtTheEnd(), lr=1e3, milestones=())
    with pytest.raises(DivergedError, match=r"the weights are not finite in epoch 4.*too high"):
        overflowing.fit(Watch())
    assert set(seen) == {1, 2, 3}
    with pytest.raises(DivergedError):
        overflowing.state()


def test_images_that_are_not_finite_are_named(engine, toy_images):
    data = Data.split(toy_images(), validation=0.25)
    data.train.images[5] = float("nan")
    with pytest.raises(DivergedError, match="images that are not finite"):
        engine(None, data=data).fit()


def test_infinities_that_belong_to_the_model_are_none_of_its_business(engine):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    assert len(engine(None, model).fit()) == 4


SOURCE = """
from at_smooth import Regularizer
class Explosive(Regularizer):
    "Goes off once the learning rate is too high for it."
    def terms(self, step):
        broken = 0.5 <= step.progress < 0.6 and {condition}
        return {{"method": step.loss * (float("nan") if broken else 1)}}
"""


@pytest.fixture
def explosive(tmp_path, monkeypatch):
    """Makes the name of a regularizer that goes off under a condition."""
    monkeypatch.chdir(tmp_path)

    def make(condition):
        name = f"explosive_{abs(hash(condition))}"
        (tmp_path / f"{name}.py").write_text(SOURCE.format(condition=condition))
        return f"{name}:Explosive"

    return make


def test_a_diverged_run_keeps_the_last_good_checkpoint_and_a_dump(tiny, tmp_path, explosive):
    with pytest.raises(DivergedError) as caught:
        train(tiny(regularizer=explosive("True")), tmp_path / "run")
    run = Run(tmp_path / "run")
    message = str(caught.value)
    assert f"The last good checkpoint stands: {run.checkpoint('last')}, epoch 2." in message
    assert f"{run.path / 'divergence.pt'}" in message
    assert checkpoint.load(run.checkpoint("last"))["state"]["epoch"] == 2
    dump = checkpoint.load(run.path / "divergence.pt")
    assert (dump["epoch"], dump["step"]) == (3, 1)
    assert all_finite(dump["model"].values())
    assert not run.finished


class Halving(Silent, Observer):
    """Counts divergences, notes each epoch's rate; may interrupt one step."""

    def __init__(self, stop_at=None):
        self.diverged_at, self.rates, self._left = [], [], stop_at

    def phase(self, role, recipe, path):
        from contextlib import nullcontext

        return nullcontext(self)

    def diverged(self, engine, error):
        self.diverged_at.append(engine.epoch)

    def stepped(self, engine):
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGINT)


# The plugin cannot see the rate, so it counts how often it was asked: twice broken, then whole.
TWICE = "__import__('pathlib').Path('count').open('a').write('x') and __import__('os').path.getsize('count') <= 2"


def test_retry_goes_back_and_lowers_the_learning_rate(tiny, tmp_path, explosive):
    recipe = tiny(regularizer=explosive(TWICE), on_divergence="retry", lr=0.08, milestones=(3,), smoother="swa")
    watching = Halving()
    run = train(recipe, tmp_path / "run", progress=watching)
    assert watching.diverged_at == [2, 2]
    assert [row["lr"] for row in run.history] == pytest.approx([0.08, 0.08, 0.02, 0.002])
    assert run.finished
    assert run.recipe.lr == 0.08


def test_retry_gives_up_after_three_times(tiny, tmp_path, explosive):
    watching = Halving()
    recipe = tiny(regularizer=explosive("True"), on_divergence="retry")
    with pytest.raises(DivergedError, match="epoch 2"):
        train(recipe, tmp_path / "run", progress=watching)
    assert watching.diverged_at == [2] * 4


def test_a_retry_goes_back_to_the_epochs_beginning_also_after_a_stop_in_its_middle(tiny, tmp_path, explosive):
    recipe = tiny(
        regularizer=explosive("0.55 < step.progress"),
        on_divergence="retry",
        smoother="iswa",
        lr_schedule="cosine",
    )
    with pytest.raises(DivergedError):  # always breaks in the second step of epoch 3, after being saved in the first
        train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=Halving(6))
    watching = Halving()
    with pytest.raises(DivergedError) as caught:
        train(recipe, tmp_path / "run", resume=True, progress=watching)
    assert len(watching.diverged_at) == 4
    one, other = (checkpoint.load(tmp_path / name / "divergence.pt") for name in ("whole", "run"))
    assert one["lr"] == other["lr"]
    assert one["message"].partition(" The last")[0] == other["message"].partition(" The last")[0]
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    assert "epoch 3, step 2" in str(caught.value)


def test_a_run_that_stopped_may_be_told_to_retry(tiny, tmp_path, explosive):
    name = explosive(TWICE)
    with pytest.raises(DivergedError):
        train(tiny(regularizer=name), tmp_path / "run")
    recipe = tiny(regularizer=name, on_divergence="retry")
    run = train(recipe, tmp_path / "run", resume=True, override=True)
    assert run.history[-2]["lr"] < run.history[1]["lr"]
