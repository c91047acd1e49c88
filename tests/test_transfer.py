import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from at_smooth import PGD, Adversary, Threat, load_data, load_model, train
from at_smooth.cli import cli
from at_smooth.data import Part
from at_smooth.exceptions import OptionError
from at_smooth.runtime import Runtime, fenced_randomness
from at_smooth.transfer import transfer

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def other_run(tiny, tmp_path_factory):
    """Another model on the same data."""
    return train(tiny(method="standard", seed=1, split_seed=0), tmp_path_factory.mktemp("other") / "run")


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def linear(weights):
    """A model of two classes whose decision is the sign of a weighted sum of two pixels, centred."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    weights = torch.tensor(weights)
    model[1].weight.data = torch.stack([-weights, weights])
    model[1].bias.data = torch.tensor([0.5, -0.5]) * weights.sum()
    return model


def test_each_model_is_attacked_and_judged_by_all():
    one, other = linear([1.0, 0.0]), linear([0.0, 1.0])  # each looks at its own pixel alone
    images = torch.tensor([[0.6, 0.6], [0.4, 0.4], [0.9, 0.6]]).view(3, 1, 1, 2)
    part = Part(images, torch.tensor([1, 0, 1]))
    found = transfer({"one": one, "other": other}, part, PGD(threat=Threat("Linf", 0.2), mode="eval",
                                                             random_start=False), runtime=CPU)  # fmt: skip
    right = {source: {target: who.tolist() for target, who in row.items()} for source, row in found.right.items()}
    everyone, third = [True, True, True], [False, False, True]
    assert right["clean"] == {"one": everyone, "other": everyone}
    assert right["one"] == {"one": third, "other": everyone}
    assert right["other"] == {"one": everyone, "other": [False, False, False]}
    assert found.results()["one"]["one"]["accuracy"] == pytest.approx(100 / 3)


def test_it_is_the_attack_called_directly(plain_run, other_run):
    models = {"plain": load_model(plain_run.path), "other": load_model(other_run.path)}
    test = load_data(plain_run.path).test
    part = Part(test.images[:60], test.labels[:60])
    spec = PGD(threat=plain_run.recipe.threat, steps=3, mode="eval")
    found = transfer(models, part, spec, seed=5, runtime=CPU)
    [batch] = part.batches(60)
    with fenced_randomness(5, "batch 0"):
        perturbed = Adversary(models["plain"], spec)(batch.clean, batch.labels)
    with torch.no_grad():
        assert torch.equal(found.right["plain"]["other"], models["other"](perturbed).argmax(1) == part.labels)


def test_nothing_of_the_callers_changes(plain_run):
    model = load_model(plain_run.path).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    part = Part(torch.rand(8, 1, 8, 8), torch.arange(8))
    state = torch.random.get_rng_state()
    transfer({"it": model}, part, PGD(threat=Threat("Linf", 0.1), mode="eval"), runtime=CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_of_other_classes_are_refused():
    part = Part(torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
    three = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(OptionError, match="same classes"):
        transfer({"two": linear([1.0, 1.0]), "three": three}, part, PGD(threat=Threat("Linf", 0.1), mode="eval"))


def test_the_command_prints_a_matrix_over_any_number_of_runs(plain_run, other_run, smoothed_run, tmp_path):
    runs = [plain_run.path, other_run.path, smoothed_run.path]
    file = tmp_path / "transfer.json"
    result = call("transfer", *runs, "-A", "steps=3", "--n-examples", "50", "--json", file, "--device", "cpu")
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert list(content["results"]) == ["clean", *map(str, runs)]
    for row in content["results"].values():
        assert list(row) == [str(path) for path in runs]
        assert all(cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1] for cell in row.values())
    assert content["n"] == 50
    assert content["attack"]["steps"] == 3
    assert "judged on 3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--eps", "0"], "eps"),
        (["--attack", "nobody"], "nobody"),
        (["-A", "nonsense=1"], "nonsense"),
        (["--norm", "L2"], "--eps"),
        (["missing-run"], "missing-run"),
    ],
)
def test_bad_input_is_refused_by_name(plain_run, arguments, word):
    result = call("transfer", plain_run.path, *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_runs_of_other_data_or_threats_are_refused(tiny, plain_run, tmp_path):
    harder = train(tiny(eps=0.2, epochs=1), tmp_path / "harder")
    assert "Linf, eps 0.2" in call("transfer", plain_run.path, harder.path).stderr
    assert call("transfer", plain_run.path, harder.path, "--eps", "0.1", "-A", "steps=1").exit_code == 0
    assert call("transfer", plain_run.path, plain_run.path).exit_code == 2
    fewer = train(tiny(dataset_options={"pool": 200}, epochs=1), tmp_path / "fewer")
    assert "not of the same data" in call("transfer", plain_run.path, fewer.path, "--part", "val").stderr
    assert call("transfer", plain_run.path, fewer.path, "-A", "steps=1").exit_code == 0
