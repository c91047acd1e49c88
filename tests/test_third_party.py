import json
import os
import shutil
import subprocess
import sys
import sysconfig
from configparser import ConfigParser

import pytest

pytestmark = pytest.mark.slow

SOURCES = ("at_smooth", "plugins", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def environment(repository, tmp_path_factory):
    """A clean virtual environment with at-smooth and the example's distribution; torch and the like are lent to it."""
    folder = tmp_path_factory.mktemp("third-party")
    sources = folder / "at-smooth"  # a copy, since building leaves files beside the sources
    sources.mkdir()
    for path in map(repository.joinpath, SOURCES):
        if path.is_dir():
            shutil.copytree(path, sources / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, sources)
    example = folder / "example"
    shutil.copytree(repository / "examples" / "third_party_plugin", example)

    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", sources, example], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    lent = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    with open(os.path.join(site, "lent.pth"), "w", encoding="utf-8") as file:
        file.write("".join(f"{path}\n" for path in lent))
    return python, example


@pytest.fixture(scope="module")
def at_smooth(environment):
    """Runs that environment's ``at-smooth``."""
    python, _ = environment
    script = python.parent / "at-smooth"

    def run(*arguments):
        return subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture(scope="module")
def example(environment):
    """The example's distribution and its one plugin."""
    config = ConfigParser()
    config.read(environment[1] / "setup.cfg")
    [line] = config["options.entry_points"]["at_smooth.regularizers"].split("\n")[1:]
    return config["metadata"]["name"], line.partition("=")[0].strip()


def test_both_distributions_are_the_environments_own(environment, example):
    code = "import sys, importlib.metadata as m; print(*(m.distribution(n)._path for n in sys.argv[1:]), sep='\\n')"
    python, _ = environment
    done = subprocess.run(
        [python, "-I", "-c", code, "at-smooth", example[0]], capture_output=True, text=True, check=True
    )
    assert all(str(python.parents[1]) in line for line in done.stdout.splitlines())


def test_the_examples_plugin_is_listed_with_its_distribution(at_smooth, example):
    rows = [line.split() for line in at_smooth("plugins", "regularizers").splitlines()]
    assert [row for row in rows if row[1:3] == [example[1], example[0]]]
    assert example[0] in at_smooth("plugins", "regularizers", example[1])


def test_the_examples_plugin_trains(at_smooth, example, tmp_path):
    tiny = ["-D", "pool=60", "-N", "width=16", "--epochs", "2", "--device", "cpu"]
    for name in (example[1], "none"):
        at_smooth("train", *tiny, "--regularizer", name, "--out", tmp_path / name)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in (example[1], "none")]
    assert summaries[0]["recipe"]["regularizer"] == example[1]
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",") for name in (example[1], "none")]
    assert rows[0][2] != rows[1][2]  # the training loss has a term of its own
