"""Real processes that are started together take a name each, or one takes it and the others say so."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TRAIN = ("train", "-D", "pool=100", "--model", "mlp", "-N", "width=8", "-N", "depth=1", "--epochs", "2",
         "-A", "steps=1", "--set", "eval_steps=1", "--device", "cpu")  # fmt: skip
AT_ONCE, ROUNDS = 3, 2


@pytest.fixture
def together(command, tmp_path):
    """Starts a command several times at once; gives the exit codes and what was said on standard error."""

    def start(*arguments):
        processes = [command(*arguments, cwd=tmp_path) for _ in range(AT_ONCE)]
        said = [process.communicate() for process in processes]
        assert not [errors for _, errors in said if "Traceback" in errors]
        return sorted(process.returncode for process in processes), [errors for _, errors in said]

    return start


def test_trainings_without_out_take_the_next_free_directory_each(together, tmp_path):
    for number in range(1, ROUNDS + 1):
        codes, errors = together(*TRAIN)
        assert codes == [0] * AT_ONCE, errors
        runs = sorted((tmp_path / "runs").iterdir())
        assert len(runs) == number * AT_ONCE
        assert all((run / "summary.json").is_file() for run in runs)
        assert not list(tmp_path.rglob("*.part"))


def test_evaluations_keep_a_report_each_and_one_gets_the_file(together, command, tmp_path):
    assert command(*TRAIN, "--out", "run", cwd=tmp_path).wait() == 0
    kept = tmp_path / "run" / "evaluations"
    for number in range(1, ROUNDS + 1):
        file = tmp_path / f"{number}.json"
        codes, errors = together("evaluate", "run", "--with", "clean", "--n-examples", "5", "--json", file)
        assert codes == [0, 2, 2]
        assert sum("exists already" in each for each in errors) == 2
        assert json.loads(file.read_text())["n"] == 5
        assert len(list(kept.iterdir())) == number * AT_ONCE
    for arguments in (("report", "run", "--figures", "none"), ("analyze", "curves", "run")):
        codes, errors = together(*arguments)
        assert codes == [0] * AT_ONCE, errors
    assert sorted(path.name for path in (tmp_path / "run").glob("report*")) == [
        "report-2.html", "report-3.html", "report.html"
    ]  # fmt: skip
    assert len(list((tmp_path / "run" / "analyses").iterdir())) == 3 * AT_ONCE
    for arguments in (("report", "run", "--out", "r.html"), ("export", "run", "--out", "out")):
        codes, errors = together(*arguments)
        assert codes == [0, 2, 2]
        assert sum("exists" in each for each in errors) == 2
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="there is no such device")
def test_figures_can_be_written_to_the_standard_output_and_are_alone_there(command, plain_run, tmp_path):
    arguments = ("evaluate", plain_run.path, "--with", "clean", "--n-examples", "5", "--json", "/dev/stdout")
    printed, said = command(*arguments, cwd=tmp_path).communicate()  # a pipe
    assert json.loads(printed)["n"] == 5
    assert "accuracy" in said
    script = Path(sysconfig.get_path("scripts")) / "at-smooth"
    with (tmp_path / "file").open("w") as file:
        assert subprocess.run([script, *map(str, arguments)], stdout=file, check=False).returncode == 0
    assert json.loads((tmp_path / "file").read_text())["n"] == 5
