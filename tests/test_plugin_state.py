"""What methods, regularizers and smoothers remember: saved, put back, compared."""

import collections
import copy
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import PrivateAttr
from torch import nn

from at_smooth import (
    AttackSpec,
    CheckpointError,
    DivergedError,
    Engine,
    Method,
    Observer,
    OptionError,
    Regularizer,
    Run,
    Runtime,
    Settings,
    Threat,
    TrainingPlugin,
    WeightSmoother,
    checkpoint,
    train,
)
from at_smooth.plugin_state import copied, devices_of, fingerprint
from at_smooth.ranks import Ranks

REMEMBERING = '''
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PrivateAttr

from at_smooth import Method


class Learned(Method):
    """Weighs its loss by a temperature that it learns with an optimiser of its own, and by a mean of losses before."""

    _temperature: Any = PrivateAttr(default_factory=lambda: torch.nn.Parameter(torch.ones(1)))
    _optimizer: Any = PrivateAttr(default=None)
    _mean: float = PrivateAttr(default=1.0)

    def model_post_init(self, context):
        super().model_post_init(context)
        self._optimizer = torch.optim.SGD([self._temperature], 0.05, momentum=0.9)

    def loss(self, model, clean, perturbed, targets):
        logits = model(perturbed)
        self._optimizer.zero_grad()
        F.cross_entropy(logits.detach() / self._temperature, targets).backward()
        self._optimizer.step()
        loss = F.cross_entropy(logits / self._temperature.detach(), targets)
        self._mean = 0.9 * self._mean + 0.1 * loss.item()
        return loss * self._mean, logits

    def state(self):
        temperature = self._temperature.detach()
        return {"temperature": temperature, "optimizer": self._optimizer.state_dict(), "mean": self._mean}

    def restore(self, state):
        with torch.no_grad():
            self._temperature.copy_(state["temperature"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._mean = state["mean"]
'''


@pytest.fixture
def learned(tmp_path, monkeypatch):
    """The name of a method that remembers."""
    (tmp_path / "remembering.py").write_text(REMEMBERING)
    monkeypatch.chdir(tmp_path)
    return "remembering:Learned"


@pytest.mark.parametrize("midway", [False, True])
def test_a_method_that_remembers_resumes_to_the_same_bits(
    learned, stopped_run, tiny, tmp_path, assert_same_outcome, midway
):
    whole = train(tiny(method=learned), tmp_path / "whole")
    recipe, path = stopped_run(method=learned, midway=midway)
    if midway:  # a bare interruption saves nothing, a signal would
        assert torch.load(path / "checkpoints" / "last.pt", weights_only=True)["state"]["epoch"] == 2
    assert_same_outcome(whole, train(recipe, path, resume=True))


def test_without_its_state_it_would_end_in_others(learned, stopped_run, tiny, tmp_path, outcome):
    whole = train(tiny(method=learned), tmp_path / "whole")
    recipe, path = stopped_run(method=learned)
    last = path / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    content["state"]["method"] = {**content["state"]["method"], "mean": 1.0}
    checkpoint.save(last, content)
    assert outcome(train(recipe, path, resume=True))[2].keys() == outcome(whole)[2].keys()
    weights = [outcome(run)[2]["final", "raw", "network.1.weight"] for run in (whole, Run(path))]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("method"),
        lambda state: state.pop("elsewhere"),
        lambda state: state.update(method=[1]),
        lambda state: state["method"].pop("mean"),
        lambda state: state["method"].update(temperature=torch.ones(1, dtype=torch.long)),
        lambda state: state["elsewhere"].update(method=[]),
        lambda state: state["elsewhere"].update(method=["cpu", "cpu"]),
    ],
)
def test_a_damaged_state_of_a_method_is_refused(learned, stopped_run, change):
    recipe, path = stopped_run(method=learned)
    last = path / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    change(content["state"])
    checkpoint.save(last, content)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        train(recipe, path, resume=True)


# --- in a bare engine


class Adding(Method):
    """Adds the number of its calls to the loss."""

    _calls: int = PrivateAttr(default=0)

    def loss(self, model, clean, perturbed, targets):
        self._calls += 1
        logits = model(perturbed)
        return F.cross_entropy(logits, targets) + self._calls, logits

    def state(self):
        return {"calls": self._calls}

    def restore(self, state):
        self._calls = state["calls"]


class Exploding(Regularizer):
    """Breaks the first loss of the second half, once."""

    _broke: bool = PrivateAttr(default=False)

    def terms(self, step):
        breaks, self._broke = step.progress >= 0.5 and not self._broke, self._broke or step.progress >= 0.5
        return {"method": step.loss * (float("nan") if breaks else 1)}

    def state(self):
        return {}


@pytest.fixture
def engine(toy_data):
    def make(method=None, regularizer=None, smoother=None, ranks=None, **settings):
        torch.manual_seed(0)
        return Engine(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
            toy_data(),
            method=method or Adding(),
            attack=AttackSpec.parse("pgd", Threat("Linf", 0.1), {"steps": 1}),
            regularizer=regularizer,
            smoother=smoother,
            settings=Settings(**{"epochs": 4, "batch_size": 18, "eval_steps": 1, "test_every": 0, **settings}),
            runtime=Runtime.choose("cpu", ranks=ranks),
        )

    return make


def test_a_divergence_goes_back_to_what_the_method_knew(engine):
    plain, retried = engine(), engine(regularizer=Exploding(), on_divergence="retry")
    plain.fit()
    retried.fit()
    assert retried.retries == 1
    assert plain.method._calls == retried.method._calls == 8
    with pytest.raises(DivergedError):
        engine(regularizer=Exploding()).fit()


def test_a_state_that_was_handed_over_is_a_copy(engine):
    class Sums(Regularizer):
        _sums: Any = PrivateAttr(default_factory=lambda: [torch.zeros(2)])

        def terms(self, step):
            self._sums[0] += 1
            return {"method": step.loss}

        def state(self):
            return {"sums": self._sums}

        def restore(self, state):
            self._sums = state["sums"]

    class Stop(Observer):
        def epoch_ended(self, engine, row, improved):
            if row["epoch"] == 2:
                raise KeyboardInterrupt

    begun = engine(regularizer=Sums())
    with pytest.raises(KeyboardInterrupt):
        begun.fit(Stop())
    state = copy.deepcopy(begun.state())
    for _ in range(2):
        continued = engine(regularizer=Sums())
        continued.restore(state, {})
        continued.fit()
        assert torch.equal(continued.regularizer._sums[0], torch.full((2,), 8.0))
        assert torch.equal(state["regularizer"]["sums"][0], torch.full((2,), 4.0))
        assert len(state["history"]) == 2


def test_observers_cannot_change_the_history(engine):
    class Vandal(Observer):
        def epoch_ended(self, engine, row, improved):
            row.clear()
            improved.clear()
            engine.state()["history"].clear()

    rows = engine().fit(Vandal(), Vandal())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


class Everywhere(Adding):
    """Remembers the same on all ranks."""

    same_on_all_ranks: ClassVar[bool] = True


class Memory(Regularizer):
    def state(self):
        return {"seen": 1}

    def restore(self, state):
        pass


class Averaging(WeightSmoother):
    def state(self):
        return {"mean": 1}

    def restore(self, state):
        pass


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ({"method": Adding()}, "method Adding remembers what it saw.*same_on_all_ranks"),
        ({"method": Everywhere(), "regularizer": Memory()}, "regularizer Memory remembers what it saw"),
        ({"method": Everywhere()}, None),
        ({"method": Everywhere(), "smoother": Averaging()}, None),
    ],
)
def test_memory_of_one_rank_is_refused_where_there_are_several(engine, plugin, words):
    if words is None:
        engine(ranks=Ranks(0, 2), **plugin)
    else:
        with pytest.raises(OptionError, match=words):
            engine(ranks=Ranks(0, 2), **plugin)


# --- the parts


def test_a_copy_has_containers_and_tensors_of_its_own():
    state = {"a": [torch.ones(2), {"b": (torch.zeros(1), "word")}], 3: nn.Linear(2, 2).state_dict()}
    own = copied(state)
    assert fingerprint(own) == fingerprint(state)
    own["a"][0].zero_()
    own["a"][1]["c"] = 1
    own[3]["weight"].zero_()
    assert state["a"][0].sum() == 2
    assert list(state["a"][1]) == ["b"]
    assert state[3]["weight"].abs().sum() > 0
    assert own[3]._metadata == state[3]._metadata


def test_tensors_go_back_to_where_they_were():
    elsewhere = torch.device("meta")
    state = {"here": torch.ones(2), "there": [torch.ones(3, device=elsewhere), torch.ones(1)]}
    assert devices_of(state) == [False, True, False]
    saved = {"here": torch.ones(2), "there": [torch.ones(3), torch.ones(1)]}  # as a file gives them
    back = copied(saved, devices_of(state), elsewhere)
    assert devices_of(back) == [False, True, False]
    with pytest.raises(ValueError, match="it holds 3 tensors, not 1"):
        copied(saved, [True], elsewhere)


def stepped():
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer


SAME = {
    "numbers": lambda: [1, 2.5, None, "a", b"b", float("nan")],
    "tensors": lambda: {"half": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.zeros(0), "one": torch.tensor(1)},
    "arrays": lambda: np.arange(6).reshape(2, 3),
    "containers": lambda: [collections.deque([1]), {1, 2}, collections.defaultdict(list, a=[1])],
    "generators": lambda: [torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)],
    "modules": lambda: stepped().param_groups[0]["params"],
    "optimisers": stepped,
}


@pytest.mark.parametrize("name", SAME)
def test_equal_content_has_equal_fingerprints(name):
    assert fingerprint(SAME[name]()) == fingerprint(SAME[name]())
    assert fingerprint(SAME[name]()) != fingerprint([*SAME, name])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.0, -0.0),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), -torch.zeros(2)),
        ({"a": 1}, {"b": 1}),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (object(), object()),
    ],
)
def test_other_content_has_another(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_every_training_plugin_has_a_state():
    for cls in (Method, Regularizer, WeightSmoother):
        assert issubclass(cls, TrainingPlugin)
    assert Adding().state() == {"calls": 0}
