import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from at_smooth import DataError, Recipe, Run, train
from at_smooth.cli import cli
from at_smooth.reproduce import Forecast

TINY = [
    *("-D", "pool=100", "-N", "width=8", "-N", "depth=1", "-A", "steps=2"),
    *("--set", "eval_steps=2", "--batch-size", "32", "--device", "cpu", "--test-every", "1"),
]
SWA = ["--regularizer", "label-smoothing", "--smoother", "swa"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, with room for wide tables."""
    path = tmp_path / "folder"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("COLUMNS", "120")
    return path


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments, code=2):
    """The message of a command that is refused: one, on standard error, and no traceback."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    return result.stderr


def test_help_names_the_commands_and_options():
    assert all(name in succeed("--help") for name in ("train", "plugins", "compare"))
    options = (
        "--dataset --data-dir --model --method --attack --norm --eps --regularizer --smoother --recipe --epochs "
        "--batch-size --lr --seed --device --precision --compile --out --resume --dry-run -D -N -M -A -R -S"
    )
    text = succeed("train", "--help")
    assert all(option in text for option in options.split())


def test_a_dry_run_prints_the_plan_and_trains_nothing(folder):
    text = succeed("train", *TINY, "--regularizer", "kd-std-adv", "-R", "temperature=3", "--dry-run", "--out", "run")
    recipe = Recipe(**yaml.safe_load(text))
    assert recipe.regularizer_options["temperature"] == 3
    assert recipe.model_options == {"width": 8, "depth": 1}
    assert recipe.attack_options["steps"] == 2
    assert recipe.eval_steps == 2
    assert "parameters: 618" in text  # 64 * 8 + 2 * 8 + 8 * 10 + 10
    assert "90 to train, 10 to validate, 700 to test" in text
    assert "device: cpu" in text
    assert not list(folder.iterdir())


FAR = """
from at_smooth import Dataset

class Far(Dataset):
    '''Would be downloaded.'''

    def available(self, data_dir):
        return False

    def load(self, data_dir):
        raise SystemExit("downloaded")
"""


def test_a_dry_run_says_what_it_cannot_know_of_a_data_set_that_is_not_here(distribution):
    distribution("elsewhere", {"datasets": {"far": "far_away:Far"}}, {"far_away": FAR})
    text = succeed("train", "--dataset", "far", "--model", "mlp", "--dry-run")
    assert "# parameters: not known" in text
    assert "# not checked: the data, whose files are not here" in text
    with pytest.raises(DataError, match="how long runs on 'far' take is not known"):
        Forecast().seconds(Recipe(dataset="far", model="mlp"))


def test_the_bare_command_is_the_digits():
    assert yaml.safe_load(succeed("train", "--dry-run")) == Recipe().to_dict()


def test_a_run_ends_with_its_table_and_curves(folder):
    text = succeed("train", *TINY, *SWA, "--epochs", "3", "--out", "run")
    summary = Run(folder / "run").summary
    assert "epoch 3/3" in text
    for weights in ("raw", "smoothed"):
        [line] = [line for line in text.splitlines() if line.split()[:1] == [weights]]
        stated = [f"{summary[weights][part][name]:.2f}" for part, name in (
            ("best", "test_ra"), ("final", "test_ra"), ("diff", "ra"),
            ("best", "test_sa"), ("final", "test_sa"), ("diff", "sa"),
        )]  # fmt: skip
        assert line.split()[1:] == stated
    assert "run/curves.png" in text


def test_a_recipe_file_is_a_start_and_the_command_line_has_the_last_word(folder, plain_run):
    (folder / "r.yaml").write_text("regularizer: kd-adv\nregularizer_options: {temperature: 3}\nepochs: 7\n")
    kept = yaml.safe_load(succeed("train", "--recipe", "r.yaml", "--epochs", "8", "--dry-run"))
    assert (kept["regularizer"], kept["regularizer_options"]["temperature"], kept["epochs"]) == ("kd-adv", 3.0, 8)
    swapped = yaml.safe_load(succeed("train", "--recipe", "r.yaml", "--regularizer", "tf-kd", "--dry-run"))
    assert swapped["regularizer_options"] == Recipe(regularizer="tf-kd").regularizer_options
    again = yaml.safe_load(succeed("train", "--recipe", plain_run.path / "recipe.yaml", "--dry-run"))
    assert again == plain_run.recipe.to_dict()


def test_the_command_and_python_do_the_same(folder, tiny, assert_same_outcome):
    succeed("train", *TINY, "--epochs", "2", "--smoother", "iswa", "--norm", "L2", "--eps", "0.5", "--out", "run")
    recipe = tiny(epochs=2, smoother="iswa", norm="L2", eps=0.5)
    assert_same_outcome(Run(folder / "run"), train(recipe, folder / "python"))


def test_plugins_are_listed_with_kind_and_distribution(distribution):
    distribution("elsewhere", {"smoothers": {"calm": "there_is_no_such_module:Calm"}})
    rows = [line.split() for line in succeed("plugins").splitlines()]
    assert ["smoothers", "calm", "elsewhere", "1.0"] in rows
    for kind, name in (("methods", "at"), ("regularizers", "kd-std-adv"), ("datasets", "digits"), ("models", "mlp")):
        assert [kind, name, "at-smooth"] in [row[:3] for row in rows]


def test_plugins_of_one_kind_are_listed_alone():
    text = succeed("plugins", "smoothers")
    assert "iswa" in text
    assert "tf-kd" not in text


def test_a_plugins_options_are_printed_with_defaults_bounds_and_help():
    rows = [line.split() for line in succeed("plugins", "regularizers", "kd-std-adv").splitlines()]
    assert [
        row for row in rows if row[:2] == ["lambda_adv", "0.5"] and {"≥", "0,", "≤", "1", "robust-trained"} <= {*row}
    ]
    assert [row for row in rows if row[:4] == ["temperature", "2.0", ">", "0"]]


def test_a_plugin_without_options_says_so():
    assert "No options" in succeed("plugins", "regularizers", "none")


@pytest.mark.parametrize(("style", "first"), [("markdown", "| setting"), ("latex", r"\begin"), ("csv", "setting,")])
def test_compare_prints_the_table(plain_run, smoothed_run, style, first):
    text = succeed("compare", plain_run.path, smoothed_run.path, "--format", style)
    assert text.startswith(first)
    assert f"{smoothed_run.summary['smoothed']['best']['test_sa']:.1f}"[:3] in text


def test_compare_prints_text_by_default(plain_run, smoothed_run):
    text = succeed("compare", plain_run.path, smoothed_run.path)
    assert f"{smoothed_run.summary['smoothed']['final']['test_ra']:.2f}" in text
    assert f"{plain_run.summary['raw']['final']['test_ra']:.2f}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--regularizer", "kd-std-avd"], ["'kd-std-avd'", "did you mean 'kd-std-adv'"]),
        (["--dataset", "digts"], ["did you mean 'digits'"]),
        (["--attack", "gdp"], ["no attack 'gdp'"]),
        (["-D", "pol=3"], ["pol", "there is no such option", "pool"]),
        (["-D", "pool=3"], ["pool", "greater than or equal to 20"]),
        (["-N", "width=wide"], ["model mlp: width", "'wide'"]),
        (["-R", "alpha"], ["'alpha' is not of the form key=value"]),
        (["-R", "=3"], ["key=value"]),
        (["--set", "epohcs=3"], ["epohcs"]),
        (["--regularizer", "kd-std-adv", "-R", "lambda_adv=0.9"], ["lambda_adv + lambda_std"]),
        (["--eps", "junk"], ["eps", "'junk' is neither a number nor a fraction"]),
        (["--eps", "8"], ["eps 8 is more than 1", "did you mean 8/255?"]),
        (["--norm", "L2", "--eps", "128"], ["eps 128 is more than 8", "did you mean 128/255?"]),
        (["-A", "step_size=2"], ["step_size: 2 is more than 1", "did you mean 2/255?"]),
        (["--eps=-0.1"], ["eps", "greater than or equal to 0"]),
        (["--norm", "L3"], ["--norm", "L3"]),
        (["--epochs", "0"], ["epochs", "greater than or equal to 1"]),
        (["--device", "gpu"], ["device 'gpu'"]),
        (["--dataset", "npz"], ["--data-dir"]),
        (["--dataset", "npz", "--data-dir", "missing.npz"], ["nothing at", "missing.npz"]),
        (["--recipe", "missing.yaml"], ["missing.yaml"]),
        (["--model", "convnet", "-N", "stages=6"], ["6 stages need images"]),
        (["--regularizer", "kd-adv", "-R", "adv_teacher=missing"], ["no checkpoint", "missing"]),
        (["--resume"], ["--out"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_with_one_message(folder, arguments, words):
    message = refused("train", "--epochs", "1", *arguments)
    assert all(word in " ".join(message.split()) for word in words)
    assert not list(folder.glob("runs/*"))


def test_what_stops_nothing_is_said_once_on_standard_error(npz):
    path = npz(x_test=np.zeros((0, 6, 6), np.uint8), y_test=np.zeros(0, int))
    small = ("--dataset", "npz", "--data-dir", path, "--model", "mlp", *TINY[2:], "--set", "threads=1")
    result = call("train", *small, "--regularizer", "kd-adv", "--epochs", "1", "--test-every", "0", "--out", "run")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [f"note: {path} has no test images, so nothing is measured on a test set"]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"y_train": np.arange(40) % 3}, ["-D", "num_classes=2"], "label 2 of example 2 is outside the 2 classes"),
        ({"y_train": np.arange(40) % 2 - 1}, [], "label -1 of example 0"),
        ({"x_train": np.full((40, 6, 6), 1.5)}, [], "outside [0, 1]"),
        ({"x_test": np.full((10, 6, 6), np.nan)}, [], "test set: pixel values run from nan"),
        ({"x_test": None}, [], "lacks x_test"),
    ],
)
def test_bad_arrays_are_refused_with_one_message(folder, npz, changes, options, words):
    assert words in refused("train", "--dataset", "npz", "--data-dir", npz(**changes), *options, "--out", "run")
    assert not list(folder.iterdir())


def test_a_taken_folder_is_refused_and_left_as_it_is(folder, plain_run, contents):
    (folder / "notes.txt").write_text("mine")
    for path, words in ((plain_run.path, "--resume"), (folder, "not an empty folder"), (folder / "notes.txt", "--out")):
        before = contents(path if path.is_dir() else folder)
        assert words in refused("train", *TINY, "--epochs", "1", "--out", path)
        assert contents(path if path.is_dir() else folder) == before


def test_nothing_to_resume_is_refused(folder):
    assert "no run to resume" in refused("train", "--out", folder / "nothing", "--resume")
    assert not list(folder.iterdir())


def test_resuming_with_another_recipe_is_refused(plain_run, contents):
    before = contents(plain_run.path)
    assert "epochs was 4, is now 9" in refused("train", "--out", plain_run.path, "--resume", "--epochs", "9")
    assert contents(plain_run.path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plugins", "method"], "did you mean 'methods'"),
        (["plugins", "methods", "ta"], "did you mean"),
        (["compare", "missing"], "no run directory"),
        (["tarin"], "tarin"),
    ],
)
def test_other_commands_refuse_bad_input_likewise(arguments, words):
    assert words in refused(*arguments)


def test_a_broken_plugin_names_its_distribution(distribution):
    distribution("shoddy", {"regularizers": {"shoddy": "shoddy_plugin:Thing"}}, {"shoddy_plugin": "1 / 0"})
    assert "'shoddy' 1.0" in refused("train", "--regularizer", "shoddy")
    assert "'shoddy' 1.0" in refused("plugins", "regularizers", "shoddy")


def test_divergence_is_3():
    message = refused("train", *TINY, "--lr", "1e30", "--epochs", "4", "--out", "run", code=3)
    assert "lower --lr" in message


LONG = ["train", *TINY, *SWA, "--epochs", "20", "--test-every", "0", "-A", "steps=10"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The long run, left alone."""
    path = tmp_path_factory.mktemp("whole") / "run"
    succeed(*LONG, "--out", path)
    return Run(path)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_an_interrupted_run_is_resumed_as_if_nothing_had_been(
    folder, command, whole, number, code, assert_same_outcome
):
    process = command(*LONG, "--out", folder / "run")
    metrics = folder / "run" / "metrics.csv"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert not Run(folder / "run").finished
    if code > 0:
        assert "--resume" in stderr
        assert "Traceback" not in stderr
    succeed("train", "--out", folder / "run", "--resume")
    assert_same_outcome(Run(folder / "run"), whole)


def test_the_module_is_the_command(command, folder):
    done = subprocess.run([sys.executable, "-m", "at_smooth", "--version"], capture_output=True, text=True, check=True)
    script = command("--version")
    assert script.communicate()[0] == done.stdout
    assert "at-smooth" in done.stdout
