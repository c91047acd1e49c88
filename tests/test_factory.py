import pytest
import torch
from torch import nn

from at_smooth import OptionError, PluginError, create, load_model, train

MODULE = """
from torch import nn

def net(num_classes, hidden=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def by_shape(shape, num_classes):
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))

def no_network(): return 3

def no_logits(): return nn.Flatten()

def failing(**options): return nn.Linear(64, options["classes"])
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.delitem(__import__("sys").modules, "my_networks", raising=False)


def test_a_function_is_an_architecture():
    network = create("models", "my_networks:net", {"hidden": 3}).build((1, 8, 8), 10)
    assert isinstance(network, nn.Module)
    assert network[1].out_features == 3
    assert network.training
    assert create("models", "my_networks:by_shape").build((3, 4, 5), 7)(torch.rand(2, 3, 4, 5)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("net", {"hiden": 3}, "hiden"),
        ("no_network", {}, "gives int"),
        ("failing", {}, r"function fails: KeyError: 'classes' \(.*my_networks.py, line \d+\)"),
        ("no_logits", {}, r"should give logits \(2, 10\)"),
    ],
)
def test_a_function_that_makes_no_classifier_is_refused(name, options, words):
    with pytest.raises(OptionError, match=words):
        create("models", f"my_networks:{name}", options).build((1, 8, 8), 10)


@pytest.mark.parametrize("target", ["my_networks:nothing", "no_such_module:net"])
def test_a_function_that_is_not_there_is_refused(target):
    with pytest.raises(PluginError, match=r"package\.module:name"):
        create("models", target)


def test_a_run_on_ones_own_network_teaches_itself_and_loads_again(tiny, tmp_path):
    recipe = tiny(model="my_networks:net", model_options={"hidden": 5}, regularizer="kd-adv", epochs=1)
    run = train(recipe, tmp_path / "run")
    assert load_model(run.path)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert run.recipe.model_options == {"hidden": 5}
