import pytest
import torch
from click.testing import CliRunner

from at_smooth import doctor
from at_smooth.cli import cli


def call():
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["doctor"])


def test_it_prints_versions_and_plugins_and_passes(tmp_path, monkeypatch, distribution):
    monkeypatch.chdir(tmp_path)
    distribution("shoddy", {"regularizers": {"shoddy": "shoddy_plugin:Thing"}}, {"shoddy_plugin": "1 / 0"})
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call()
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for expected in (
        f"torch {torch.__version__.partition('+')[0]}",
        "python 3.",
        "at-smooth 0.",
        "device",
        "smoothers",
    ):
        assert expected in words
    assert "'shoddy' 1.0 fails to import" in words  # said, and no reason to fail
    assert "self-test passed" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_it_fails_where_resuming_does_not_work(monkeypatch):
    monkeypatch.setattr("at_smooth.data.generator", lambda *key: torch.Generator().manual_seed(torch.seed() % 2**40))
    result = call()
    assert result.exit_code == 1
    assert "Error: the self-test failed" in result.stderr
    assert "passed" not in result.output


def test_it_fails_with_a_message_where_training_breaks(monkeypatch):
    def broken(*arguments, **options):
        raise MemoryError("no more")

    monkeypatch.setattr(doctor, "train", broken)
    result = call()
    assert result.exit_code == 1
    assert "the self-test failed: MemoryError: no more" in result.stderr
    assert "Traceback" not in result.output


def test_the_folder_robustbench_of_torchattacks_is_a_trap(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: {"robustbench": ["torchattacks"]})
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    assert "not RobustBench" in doctor._robustbench()
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: {"robustbench": ["robustbench"]})
    assert doctor._robustbench() is None


@pytest.mark.parametrize(
    ("line", "found"), [("from torch.autograd.gradcheck import zero_gradients", True), ("", False)]
)
def test_an_advertorch_that_needs_mending_is_a_trap(monkeypatch, tmp_path, line, found):
    (tmp_path / "advertorch" / "attacks").mkdir(parents=True)
    (tmp_path / "advertorch" / "__init__.py").write_text("")
    (tmp_path / "advertorch" / "attacks" / "fab.py").write_text(line)

    class Spec:
        submodule_search_locations = (str(tmp_path / "advertorch"),)

    monkeypatch.setattr(doctor, "find_spec", lambda name: Spec)
    assert bool(doctor._advertorch()) == found


@pytest.mark.parametrize(("version", "found"), [("2.25.1", True), ("2.32.0", False), (None, False)])
def test_a_pinned_requests_is_a_trap(monkeypatch, version, found):
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    assert bool(doctor._requests()) == found
