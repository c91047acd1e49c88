import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from at_smooth import FileError, InputError, Run
from at_smooth.cli import cli
from at_smooth.html_report import render, write_report
from at_smooth.report_sections import audits, commands, environments, evaluations, overview, recipes
from at_smooth.results import keep_in_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def copy_of(tmp_path):
    """Copies a run, so that a test may add to it."""

    def copy(run, name):
        shutil.copytree(run.path, tmp_path / name)
        return Run(tmp_path / name)

    return copy


@pytest.fixture
def unfinished(stopped_run):
    """A run of which two epochs are done."""
    _, path = stopped_run()
    return Run(path)


def evaluation(accuracy, n=700, evaluator="pgd", **changes):
    result = {"accuracy": accuracy, "ci95": [accuracy - 3, accuracy + 3], "seconds": 1.0}
    return {
        "n": n,
        "threat": {"norm": "Linf", "eps": 0.1},
        "checkpoint": "somewhere/checkpoints/final.pt",
        "weights": "raw",
        "dataset": "digits",
        "part": "test",
        "results": {evaluator: result},
        **changes,
    }


def audit(sound):
    results = {"slope": {"sound": True, "found": "it rises"}, "noise": {"sound": sound, "found": "noise & <more>"}}
    return evaluation(0.0, sound=sound, results=results)


class Page(HTMLParser):
    """What a page refers to, and what it shows outside of folds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.pictures, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.references += [given[name] for name in ("src", "href", "srcset", "action", "data") if name in given]
        if tag == "img":
            self.pictures.append(given)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_report_is_one_file_that_refers_to_nothing_outside(plain_run, smoothed_run, tmp_path):
    path = write_report([plain_run, smoothed_run.path], tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert "url(" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    assert list(tmp_path.iterdir()) == [path]


def test_it_has_every_section(plain_run, smoothed_run, copy_of):
    one, other = copy_of(plain_run, "one"), copy_of(smoothed_run, "other")
    keep_in_run(one.path, "evaluation", evaluation(64.25))
    keep_in_run(one.path, "audit", audit(sound=False))
    page = Page(render([one, other], ["curves"]))
    for title in ("Results", "Robust overfitting", "Figures", "Evaluations", "Recipes", "Environment", "Again"):
        assert title in page.text
    best = one.summary["raw"]["best"]["test_ra"]
    assert f"{best:.2f}" in page.text
    assert "64.25" in page.text
    assert "61.25 to 67.25" in page.text
    assert "NOT SOUND" in page.text
    assert "at + kd-std-adv + swa" in page.text
    assert len(page.pictures) == 3  # the analysis, and each run's own curves
    assert all(picture["alt"] for picture in page.pictures)
    assert r"\toprule" in page.text
    assert "| setting | RA best |" in page.text
    assert f"{json.loads((one.path / 'environment.json').read_text())['packages']['torch']}" in page.text


def test_text_of_others_is_text(plain_run, copy_of):
    run = copy_of(plain_run, "<script>alert(1)</script>".replace("/", "\N{DIVISION SLASH}"))
    keep_in_run(run.path, "evaluation", evaluation(50.0, evaluator="<img src=x onerror=alert(1)>"))
    keep_in_run(run.path, "audit", audit(sound=True))
    text = render([run])
    page = Page(text)
    assert "script" not in page.tags
    assert len(page.pictures) == 1
    assert "<img src=x onerror=alert(1)>" in html.unescape(text)
    assert "noise & <more>" in page.text


def test_unfinished_runs_are_marked(plain_run, unfinished):
    page = Page(render([plain_run, unfinished], ["curves"]))
    assert f"Not finished: {unfinished.path}" in page.text
    assert "not finished: epoch 2 of 4" in page.text
    assert overview([plain_run, unfinished]).marked == {(1, 3)}


def test_a_run_alone_and_not_finished(unfinished):
    page = Page(render([unfinished], ["curves"]))
    assert "No run is finished yet" in page.text
    assert len(page.pictures) == 2


def test_a_run_that_has_measured_nothing(tiny, tmp_path):
    run = Run.create(tmp_path / "run", tiny())
    page = Page(render([run], ["curves"]))
    assert "epoch 0 of 4" in page.text
    assert "could not be drawn" in page.text


def test_an_analysis_that_fails_leaves_a_note(plain_run, distribution):
    source = (
        "from at_smooth import Analysis\n"
        "class Broken(Analysis):\n    def study(self, runs):\n        raise ZeroDivisionError('<boom>')\n"
    )
    distribution("third-party", {"analyses": {"broken": "broken_analysis:Broken"}}, {"broken_analysis": source})
    page = Page(render([plain_run], ["broken", "curves"]))
    assert "broken (could not be drawn: <boom>)" in page.text
    assert len(page.pictures) == 2


def test_an_analysis_that_needs_finished_runs_gets_those(plain_run, unfinished, distribution):
    source = (
        "from matplotlib.figure import Figure\nfrom at_smooth import Analysis, InputError, Study\n"
        "class Finished(Analysis):\n    '''Only whole runs.'''\n    def study(self, runs):\n"
        "        if not all(run.finished for run in runs):\n            raise InputError('finish it')\n"
        "        return Study(Figure(), {})\n"
    )
    distribution("third-party", {"analyses": {"whole": "whole_analysis:Finished"}}, {"whole_analysis": source})
    text = Page(render([plain_run, unfinished], ["whole"])).text
    assert "whole : Only whole runs. (of the finished runs)" in text
    assert "finish it" in Page(render([unfinished], ["whole"])).text


def test_a_figure_of_many_points_is_a_png(plain_run, distribution):
    source = (
        "from at_smooth import Analysis, Study\nfrom at_smooth.style import new_figure\n"
        "class Points(Analysis):\n    '''Points.'''\n    def study(self, runs):\n        figure = new_figure()\n"
        "        figure.subplots().scatter(range(9000), range(9000))\n        return Study(figure, {})\n"
    )
    distribution("third-party", {"analyses": {"points": "points_analysis:Points"}}, {"points_analysis": source})
    first, _ = Page(render([plain_run], ["points"])).pictures
    assert first["src"].startswith("data:image/png")


def test_of_several_evaluations_the_largest_then_the_newest_counts(plain_run, copy_of):
    run = copy_of(plain_run, "run")
    for content in (evaluation(60.0), evaluation(61.0), evaluation(99.0, n=10), evaluation(50.0, evaluator="cw"),
                    evaluation(40.0, weights="smoothed"), {"results": {"pgd": {}}}):  # fmt: skip
        keep_in_run(run.path, "evaluation", content)
    rows = evaluations([run]).rows
    assert [row[1:5] for row in rows] == [
        ["final, raw", "Linf, eps 0.1", "cw", "50.00"],
        ["final, raw", "Linf, eps 0.1", "pgd", "61.00"],
        ["final, smoothed", "Linf, eps 0.1", "pgd", "40.00"],
    ]


def test_the_newest_audit_counts_and_what_is_not_sound_is_marked(plain_run, copy_of):
    run = copy_of(plain_run, "run")
    keep_in_run(run.path, "audit", audit(sound=True))
    keep_in_run(run.path, "audit", audit(sound=False))
    table = audits([run])
    assert [row[3:5] for row in table.rows] == [["slope", "sound"], ["noise", "NOT SOUND"]]
    assert table.marked == {(1, 4)}


def test_nothing_kept_makes_no_table(plain_run):
    assert evaluations([plain_run]) is None
    assert audits([plain_run]) is None


def test_differences_of_recipes_are_marked(tiny, tmp_path):
    changes = [{"seed": 0}, {"seed": 1}, {"smoother": "swa"}, {"epochs": 6, "eps": 0.2}]
    runs = [Run.create(tmp_path / str(number), tiny(**each)) for number, each in enumerate(changes)]
    differing, common = recipes(runs)
    rows = {row[0]: row[1:] for row in differing.rows}
    assert rows["seed"] == ["0, 1", "0", "0"]
    assert rows["smoother"] == ["none", "swa", "none"]
    assert rows["epochs"] == ["4", "4", "6"]
    assert rows["eps"] == ["0.1", "0.1", "0.2"]
    shared = dict(common.rows)
    assert shared["model: width"] == "8"
    assert not set(shared) & set(rows)
    number = list(rows).index("smoother")
    assert {column for row, column in differing.marked if row == number} == {2}


def test_recipes_of_one_setting_do_not_differ(tiny, tmp_path):
    differing, common = recipes([Run.create(tmp_path / "run", tiny())])
    assert differing is None
    assert ["method", "at"] in common.rows


def test_environments_are_compared(tiny, tmp_path):
    runs = [Run.create(tmp_path / name, tiny(smoother=name)) for name in ("none", "swa")]
    facts = {"python": "3.11", "packages": {"torch": "2.4", "numpy": None}, "command": ["at-smooth"], "seed": 0}
    for run, changes in zip(runs, ({}, {"python": "3.12", "resumed": [facts, facts]}), strict=True):
        (run.path / "environment.json").write_text(json.dumps({**facts, **changes}))
    differing, common = environments(runs)
    assert differing.rows == [["python", "3.11", "3.12"], ["resumed", "-", "2 times"]]
    assert common.rows == [["packages: torch", "2.4"], ["packages: numpy", "-"]]
    (runs[1].path / "environment.json").write_text("{")
    assert ["python", "3.11", "-"] in environments(runs)[0].rows


def test_the_command_repeats_the_run(plain_run, copy_of, tmp_path, assert_same_outcome):
    run = copy_of(plain_run, "a run; rm -rf $HOME")
    repeat, _ = commands(run)
    shell = ["sh", "-c", f'set -- {repeat}; for word; do echo "$word"; done']
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:2] == ["at-smooth", "train"]
    assert CliRunner().invoke(cli, words[1:]).exit_code == 0
    assert_same_outcome(run, Run(words[-1]))


def test_a_file_that_is_there_is_not_written_over(plain_run, tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    result = CliRunner().invoke(cli, ["report", str(plain_run.path), "--out", str(tmp_path / "mine.html")])
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--figures", "no-such-thing"], "no plugin 'no-such-thing' among the analyses"),
        (["--out", "no/folder/report.html"], "no folder"),
        (["{run}"], "given twice"),
        (["missing"], "no run directory"),
    ],
)
def test_bad_input_is_refused_before_any_work(plain_run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(run=plain_run.path) for argument in arguments]
    result = CliRunner().invoke(cli, ["report", str(plain_run.path), *given])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_where_a_report_goes_by_itself(plain_run, copy_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = copy_of(plain_run, "one"), copy_of(plain_run, "other")
    assert write_report([one], figures=()) == one.path / "report.html"
    assert write_report([one], figures=()) == one.path / "report-2.html"
    assert write_report([one, other], figures=()) == Path("report.html")


def test_no_runs_are_refused():
    with pytest.raises(InputError, match="at least one"):
        render([])


def test_a_recipe_that_is_none_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("epochs: 3\n")
    with pytest.raises(FileError, match="dataset: field required"):
        render([Run(tmp_path)])


def browse(path, tmp_path):
    """Open a page in a real browser: what it becomes, and what its console says.

    The pictures are judged in a copy, whose script writes down what it finds; the page itself allows none.
    """
    judge = (
        "<script>window.addEventListener('load', () => { document.body.setAttribute('data-widths', JSON.stringify("
        "[...document.images].map(image => [image.complete && image.naturalWidth, image.getBoundingClientRect().width,"
        " document.documentElement.scrollWidth - document.documentElement.clientWidth]))) })</script>"
    )
    copy = tmp_path / "judged.html"
    text = path.read_text(encoding="utf-8")
    copy.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", judge + "</body>"), "utf-8")
    said = {}
    for page in (path, copy):
        said[page] = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=500,900",
             f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    console = [line for line in said[path].stderr.splitlines() if "CONSOLE" in line]
    widths = json.loads(html.unescape(re.search(r'data-widths="([^"]*)"', said[copy].stdout).group(1)))
    return said[path].stdout, console, widths


@pytest.fixture
def browser():
    """A real browser; without one the test is skipped, but not where it must not be."""
    if BROWSER is None:
        message = "no Chromium on PATH. On Debian: apt-get install chromium"
        pytest.fail(message) if os.environ.get("AT_SMOOTH_NEEDS_BROWSER") else pytest.skip(message)
    return browse


def test_it_opens_in_a_browser(browser, plain_run, smoothed_run, tmp_path):
    path = write_report([plain_run, smoothed_run], tmp_path / "report.html")
    page, console, pictures = browser(path, tmp_path)
    assert console == []
    assert "Robust overfitting" in page
    assert len(pictures) == 3
    assert all(natural > 0 and 0 < width <= 500 and beyond <= 0 for natural, width, beyond in pictures)


def test_the_browser_would_notice(browser, tmp_path):
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:">'
    (tmp_path / "bad.html").write_text(
        f"<html><head>{policy}</head><body><img src='data:image/png;base64,xx'>"
        "<img src='http://127.0.0.1:9/picture.png'></body></html>"
    )
    _, console, pictures = browser(tmp_path / "bad.html", tmp_path)
    assert "violates the following Content Security Policy" in " ".join(console)
    assert [natural for natural, *_ in pictures] == [0, 0]
