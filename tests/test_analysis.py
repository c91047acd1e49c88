import csv
import re

import pytest
from click.testing import CliRunner

from at_smooth import InputError, OptionError, PluginError, Run, train
from at_smooth.analysis import analyze, settings_of
from at_smooth.cli import cli

PLUGIN = """
from at_smooth import Analysis, Study
from at_smooth.style import new_figure

class Lengths(Analysis):
    '''How long runs are.'''

    unit: str = "epochs"

    def study(self, runs):
        figure = new_figure()
        figure.add_subplot().bar([run.path.name for run in runs], [len(run.history) for run in runs])
        row = {"unit": self.unit, "sum": sum(len(run.history) for run in runs)}
        return Study(figure, {"lengths": [row], "half": [{"half": row["sum"] / 2}]})
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lengths(distribution):
    """The name of an analysis that another distribution brings."""
    distribution("measures", {"analyses": {"lengths": "measures_plugin:Lengths"}}, {"measures_plugin": PLUGIN})
    return "lengths"


@pytest.fixture
def own_run(tiny, tmp_path):
    """A run that a test may write into."""
    return train(tiny(epochs=1), tmp_path / "own")


def call(*arguments):
    return CliRunner().invoke(cli, ["analyze", *map(str, arguments)])


def test_runs_that_differ_in_the_seed_share_a_setting(tiny, plain_run, smoothed_run, own_run, tmp_path):
    other_seed = train(tiny(seed=1), tmp_path / "seed-1")
    settings = settings_of([plain_run, smoothed_run, other_seed, own_run])
    assert [[run.path for run in setting.runs] for setting in settings] == [
        [plain_run.path, other_seed.path],
        [smoothed_run.path],
        [own_run.path],
    ]
    assert [setting.label for setting in settings] == [
        "at (epochs=4)",
        "at + kd-std-adv + swa (epochs=8)",
        "at (epochs=1)",
    ]


def test_labels_hold_no_endless_numbers(tiny, plain_run, tmp_path):
    other = train(tiny(norm="L2", eps=1 / 3, epochs=4), tmp_path / "other")
    assert all(not re.search(r"\d\.\d{5}", setting.label) for setting in settings_of([plain_run, other]))


def test_no_run_and_one_run_twice_are_refused(plain_run):
    with pytest.raises(InputError, match="at least one run"):
        settings_of([])
    with pytest.raises(InputError, match="given twice"):
        settings_of([plain_run, Run(plain_run.path)])


def test_figure_and_numbers_are_written(lengths, plain_run, tmp_path):
    files = analyze(lengths, [plain_run], tmp_path / "out", {"unit": "rows"})
    assert [file.name for file in files] == ["lengths.png", "lengths.svg", "lengths-lengths.csv", "lengths-half.csv"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "<text" in files[1].read_text()
    with files[2].open() as file:
        assert list(csv.DictReader(file)) == [{"unit": "rows", "sum": "4"}]


def test_the_same_analysis_gives_the_same_files(lengths, plain_run, tmp_path):
    once, twice = (analyze(lengths, [plain_run], tmp_path / name) for name in ("once", "twice"))
    assert [file.read_bytes() for file in once] == [file.read_bytes() for file in twice]


def test_a_single_table_has_the_analysis_name(plain_run, tmp_path):
    files = analyze("curves", [str(plain_run.path)], tmp_path / "out")
    assert [file.name for file in files] == ["curves.png", "curves.svg", "curves.csv"]


@pytest.mark.parametrize("taken", ["lengths.png", "lengths.svg", "lengths.csv", "lengths-half.csv"])
def test_nothing_is_written_over_or_begun(lengths, plain_run, tmp_path, taken):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / taken).write_text("mine")
    result = call(lengths, plain_run.path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert taken in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [taken]
    assert (tmp_path / "out" / taken).read_text() == "mine"


def test_by_default_files_lie_in_the_run_under_a_free_name(lengths, own_run):
    assert analyze(lengths, [own_run])[0] == own_run.path / "analyses" / "lengths.png"
    assert analyze(lengths, [own_run])[0] == own_run.path / "analyses" / "lengths-2.png"
    assert analyze(lengths, [own_run])[2] == own_run.path / "analyses" / "lengths-3-lengths.csv"


def test_several_runs_leave_theirs_in_the_working_directory(lengths, own_run, plain_run, tmp_path):
    result = call(lengths, own_run.path, plain_run.path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "analyses" / "lengths.svg").is_file()
    assert not (own_run.path / "analyses").exists()
    assert "analyses/lengths-half.csv" in result.stdout


def test_a_folder_that_is_a_file_is_refused(lengths, plain_run, tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="--out"):
            analyze(lengths, [plain_run], tmp_path / out)


def test_without_a_name_the_analyses_are_listed():
    result = call()
    assert result.exit_code == 0
    for name in ("curves", "logits", "tsne", "input-landscape", "weight-flatness", "local-linearity", "transfer",
                 "confidence", "attack-gallery"):  # fmt: skip
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["curvse", "RUN"], "did you mean 'curves'"),
        (["curves"], "at-smooth analyze curves RUN"),
        (["curves", "nowhere"], "nowhere is no run directory"),
        (["curves", "RUN", "-O", "nonsense=1"], "analysis curves: nonsense: there is no such option"),
        (["curves", "RUN", "--checkpoint", "best"], "checkpoint: there is no such option"),
        (["tsne", "RUN", "--n-examples", "0"], "n_examples"),
        (["confidence", "RUN", "--weights", "smoothed"], "no smoothed weights"),
        (["tsne", "RUN", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_refused_by_name(plain_run, tmp_path, arguments, words):
    filled = [plain_run.path if each == "RUN" else each for each in arguments]
    result = call(*filled, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_options_reach_the_analysis(plain_run, tmp_path):
    result = call("confidence", plain_run.path, "-O", "bins=3", "-O", "steps=1", "--n-examples", 40, "--seed", 5,
                  "--weights", "raw", "--checkpoint", "best", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "confidence-reliability.csv").open() as file:
        table = list(csv.DictReader(file))
    assert sum(int(row["n"]) for row in table) == 2 * 40
    assert {row["high"] for row in table} <= {"0.3333333333333333", "0.6666666666666666", "1.0"}


def test_from_python_too(plain_run, tmp_path):
    with pytest.raises(PluginError, match="analyses"):
        analyze("nothing", [plain_run])
    with pytest.raises(OptionError, match="measure"):
        analyze("curves", [plain_run], tmp_path / "out", {"measure": "loss"})
