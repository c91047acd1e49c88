import pytest
import torch

from at_smooth import CheckpointError, OptionError, checkpoint, create, load_model
from at_smooth.network import Normalize, build_network, network_from

STATISTICS = ([0.5], [0.25])


def test_normalisation_is_by_channel():
    images = torch.rand(2, 2, 3, 3)
    found = Normalize([0.5, 0.1], [0.25, 2.0])(images)
    torch.testing.assert_close(found[:, 0], (images[:, 0] - 0.5) / 0.25)
    torch.testing.assert_close(found[:, 1], (images[:, 1] - 0.1) / 2)


def test_initial_weights_follow_from_the_seed_alone(tiny):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = (build_network(tiny(seed=seed), (1, 8, 8), 10, STATISTICS) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    weights = [network.state_dict()["network.1.weight"] for network in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_checkpoints_network_has_its_weights_and_statistics(tiny):
    network = build_network(tiny(), (1, 8, 8), 10, STATISTICS).eval()
    content = {"shape": [1, 8, 8], "num_classes": 10}
    again = network_from(content, tiny(seed=3), network.state_dict(), "here")
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again(images), network(images))


def test_weights_that_do_not_fit_are_refused(tiny):
    network = build_network(tiny(), (1, 8, 8), 10, STATISTICS)
    content = {"shape": [1, 8, 8], "num_classes": 7}
    with pytest.raises(CheckpointError, match="here does not fit the model 'mlp'"):
        network_from(content, tiny(), network.state_dict(), "here")


@pytest.mark.parametrize(
    ("shape", "classes"), [([1, -8, 8], 10), ([1, 8.0, 8], 10), ([8, 8], 10), ("abc", 10), ([1, 8, 8], None)]
)
def test_a_checkpoint_of_impossible_images_is_at_fault_itself(tiny, shape, classes):
    with pytest.raises(CheckpointError, match="here does not hold what it should"):  # and not the model's plugin
        network_from({"shape": shape, "num_classes": classes}, tiny(), {}, "here")


def test_a_network_that_does_not_fit_into_memory_is_refused(tiny):
    with pytest.raises(OptionError, match=r"model mlp: too large with .*'width': 1000000000000"):
        build_network(tiny(model_options={"width": 10**12}), (1, 8, 8), 10, ([0.0], [1.0]))


def test_integers_in_the_place_of_floats_are_refused(plain_run, tmp_path):
    content = checkpoint.load(plain_run.checkpoint("best"))
    content["raw"]["normalize.std"] = content["raw"]["normalize.std"].to(torch.int64)
    checkpoint.save(tmp_path / "rounded.pt", content)
    with pytest.raises(CheckpointError, match=r"normalize.std is torch.int64, not torch.float32"):
        load_model(tmp_path / "rounded.pt")


@pytest.mark.parametrize("model", ["mlp", "wrn-34-4"])
def test_a_depth_that_no_memory_holds_is_refused_before_it_is_built(model):
    with pytest.raises(OptionError, match="depth"):
        create("models", model, {"depth": 10**9})
