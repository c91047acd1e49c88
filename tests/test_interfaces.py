import copy

import pytest
import torch
from pydantic import Field
from torch import nn

import at_smooth
from at_smooth import (
    Architecture,
    Dataset,
    Method,
    OptionError,
    Plugin,
    PluginError,
    Regularizer,
    Schedule,
    Step,
    WeightSmoother,
    create,
)
from at_smooth.interfaces import total


class Dial(Plugin):
    """A plugin with options."""

    level: int = Field(default=3, ge=0, le=5, description="how far it is turned")
    share: float = 0.5


def step(loss):
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    return Step(x, x, y, torch.arange(2), torch.rand(2, 2), loss, 0.0)


@pytest.mark.parametrize("name", at_smooth.__all__)
def test_every_public_name_is_there(name):
    assert getattr(at_smooth, name) is not None


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = at_smooth.nonsense
    assert dir(at_smooth) == sorted(at_smooth.__all__)


def test_options_have_defaults_and_read_text():
    assert Dial().options() == {"level": 3, "share": 0.5}
    assert Dial.build_from({"level": "4"}, "dial").options() == {"level": 4, "share": 0.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levle": 1}, "levle: there is no such option"),
        ({"level": 6}, r"level: .*less than or equal to 5 .*6"),
        ({"level": -1}, r"level: .*greater than or equal to 0 .*-1"),
        ({"share": "much"}, r"share: .*number.*'much'"),
    ],
)
def test_a_wrong_option_is_named_with_the_known_ones(options, words):
    with pytest.raises(OptionError, match=words) as caught:
        Dial.build_from(options, "dial")
    assert str(caught.value).startswith("dial: ")
    assert "Options: level, share" in str(caught.value)


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(OptionError, match=r"level.*share"):
        Dial.build_from({"level": 9, "share": None}, "dial")


def test_options_cannot_change_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Dial().level = 4


def test_the_bare_regularizer_changes_nothing():
    labels, loss = torch.tensor([1, 0]), torch.tensor(2.0)
    assert Regularizer().targets(labels, 2) is labels
    assert total(Regularizer().terms(step(loss))) == loss


def test_the_bare_smoother_smooths_nothing():
    model, smoother = nn.Linear(2, 2), WeightSmoother()
    before = copy.deepcopy(model.state_dict())
    smoother.attach(model, Schedule(2, 1, 1))
    smoother.before_epoch(model, 0)
    smoother.after_step(model, 0)
    assert not smoother.after_epoch(model, 0)
    assert smoother.smoothed() is None
    smoother.restore(smoother.state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("cls", "method"), [(Method, "loss"), (Dataset, "load"), (Architecture, "build")])
def test_what_has_no_neutral_choice_must_be_written(cls, method):
    with pytest.raises(TypeError, match=f"abstract.*{method}"):
        cls()


@pytest.mark.parametrize(("kind", "name", "lacks"), [("methods", "Method", "loss"), ("datasets", "Dataset", "load")])
def test_an_unfinished_plugin_is_refused_with_what_it_lacks(kind, name, lacks):
    with pytest.raises(PluginError, match=f"lacks the method {lacks}"):
        create(kind, f"at_smooth:{name}")


def test_the_loss_is_the_sum_of_its_terms():
    terms = {"a": torch.tensor(1.5, requires_grad=True), "b": torch.tensor(-0.25)}
    loss = total(terms)
    assert loss == 1.25
    loss.backward()
    assert terms["a"].grad == 1
