import json

import torch
from click.testing import CliRunner

from at_smooth import load_data, load_model
from at_smooth.cli import cli


def test_the_installed_command_does_the_main_job(command, tmp_path, cache):
    options = ["--regularizer", "kd-std-adv", "--smoother", "swa", "--epochs", "4", "-D", "pool=60", "-N", "width=16"]
    process = command("train", *options, "--out", "run", cwd=tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors

    run = tmp_path / "run"
    files = ["recipe.yaml", "environment.json", "metrics.csv", "summary.json", "curves.png"]
    assert all((run / name).stat().st_size for name in files)
    assert all((run / "checkpoints" / f"{name}.pt").is_file() for name in ("last", "best", "best_smoothed", "final"))
    assert len((run / "metrics.csv").read_text().splitlines()) == 5
    assert json.loads((run / "environment.json").read_text())["command"][1:] == ["train", *options, "--out", "run"]

    for teacher in ("standard", "at"):
        assert (run / "teachers" / teacher / "checkpoints" / "best.pt").is_file()
        assert f"self-teacher '{teacher}'" in output
        assert f"{teacher} teacher: epoch 4/4" in output
    assert len(list((cache / "teachers").iterdir())) == 2

    summary = json.loads((run / "summary.json").read_text())
    assert summary["reported"] == "smoothed"
    images, labels = load_data(run).test
    with torch.no_grad():
        right = load_model(run)(images.float() / 255).argmax(1) == labels
    assert abs(100 * right.double().mean().item() - summary["smoothed"]["final"]["test_sa"]) < 1e-6
    assert output.rstrip().endswith("run/curves.png")

    second = CliRunner().invoke(cli, ["train", *options, "--out", str(tmp_path / "second")])
    assert second.exit_code == 0
    assert second.output.count("reused") == 2
    assert "teacher: epoch" not in second.output
