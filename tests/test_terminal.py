"""Text of others is text: no markup, and nothing that controls a terminal."""

import io
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.live import Live
from rich.table import Table
from rich.text import Text

from at_smooth import Run, evaluation_progress, results, watch
from at_smooth.cli import cli
from at_smooth.evaluation import Watcher
from at_smooth.progress import Terminal
from at_smooth.terminal import Console

#: Closes a tag that nobody opened, which rich refuses; opens one, which it would swallow; an emoji; an escape.
EVIL = "[/red][bold]:smile:\x1b[31mx"
SHOWN = "[/red][bold]:smile:␛[31mx"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("COLUMNS", "300")
    return path


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def console(request):
    return Console(file=io.StringIO(), force_terminal=request.param, width=300)


def text_of(console):
    """What was written, without the codes by which rich styles it and moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("where", ["print", "soft", "text", "cell", "title", "column", "live"])
def test_nothing_is_markup_wherever_it_stands(console, where):
    table = Table(EVIL if where == "column" else "a", title=EVIL if where == "title" else None)
    table.add_row(EVIL if where == "cell" else "b" * 40)
    printed = {"print": EVIL, "soft": EVIL, "text": Text(EVIL), "live": Text(EVIL)}.get(where, table)
    with Live(printed, console=console) if where == "live" else nullcontext():
        console.print(printed, soft_wrap=where == "soft")
    assert SHOWN in text_of(console)
    assert "\x1b[31m" not in console.file.getvalue()


def test_our_own_emphasis_is_style(console):
    console.print(Text.assemble(("loud", "bold"), " ", EVIL))
    assert ("\x1b[1mloud\x1b[0m" in console.file.getvalue()) == console.is_terminal


def test_progress_shows_labels_and_roles_as_they_are(console, tiny):
    with evaluation_progress.shown(console) as watcher:
        assert isinstance(watcher, Watcher)
        watcher.stage_began(EVIL, EVIL, 10)
        watcher.batch_done(10, 50.0)
        assert console.is_terminal or not console.file.getvalue()
    terminal = Terminal(console)
    terminal.note(EVIL)
    with terminal.phase(EVIL, tiny(), Path(EVIL)) as observer:
        observer.diverged(type("Engine", (), {"may_go_back": True})(), ValueError(EVIL))
    assert text_of(console).count(f"{SHOWN}: {SHOWN}") == 1
    assert "\x1b[31m" not in console.file.getvalue()


def call(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], color=True)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "\x1b[31m" not in result.output
    return result.output


def test_labels_and_paths_with_brackets_end_no_evaluation(plain_run, folder):
    run = Run(Path(shutil.copytree(plain_run.path, folder / EVIL.replace("/", ""))))
    assert "kept in" in call("evaluate", run.path, "--with", f"{EVIL}=clean", "--n-examples", "20")
    shown = call("evaluate", run.path, "--with", f"{EVIL}=clean", "--n-examples", "20")
    assert shown.count(f"{SHOWN} ") + shown.count(f"{SHOWN}: ") == 2
    path = str(run.path).replace("\x1b", "␛")
    assert path in shown
    assert path in call("transfer", run.path, "-A", "steps=1", "--n-examples", "20")
    assert path in call("watch", run.path, "--once")
    assert path in call("report", run.path, "--figures", "none")
    for command in ("compare", "overfitting"):
        for style in ("text", "markdown", "latex", "csv"):
            call(command, run.path, "--format", style)


def test_an_audit_prints_what_it_found_as_it_is(console):
    content = {
        "threat": {"norm": "Linf", "eps": 0.1}, "checkpoint": EVIL, "weights": EVIL, "n": 20, "part": "test",
        "dataset": EVIL, "sound": False,
        "results": {EVIL: {"sound": False, "found": EVIL}, "other": {"sound": True, "found": ""}},
    }  # fmt: skip
    results.print_audit(console, content)
    assert text_of(console).count(SHOWN) == 5
    assert "NOT SOUND" in text_of(console)


def test_what_plugins_and_tables_say_is_text(distribution):
    module = f"""
from pydantic import Field
from at_smooth import Regularizer

class Thing(Regularizer):
    {EVIL!r}
    thing: str = Field(default={EVIL!r}, description={EVIL!r})
"""
    distribution("evil", {"regularizers": {"[/x]thing": "evil_thing:Thing"}}, {"evil_thing": module})
    assert "[/x]thing" in call("plugins", "regularizers")
    assert call("plugins", "regularizers", "[/x]thing").count(SHOWN) == 3


def test_teachers_in_a_watched_run_are_text(plain_run, tmp_path, console):
    run = Run(Path(shutil.copytree(plain_run.path, tmp_path / "run")))
    teacher = run.path / "teachers" / EVIL.replace("/", "")
    shutil.copytree(plain_run.path, teacher)
    (teacher / "summary.json").unlink()
    watch._lines(run, console, 0.0, lambda _: None)
    assert SHOWN.replace("/", "") in text_of(console)


def test_names_with_dollar_signs_are_drawn(plain_run, tiny, tmp_path):
    from at_smooth.style import as_svg, new_figure, paper_style
    from at_smooth_plugins.analyses.common import draw_heading, wrapped

    with paper_style():
        figure = new_figure()
        axes = figure.add_subplot(title=wrapped(r"$\nothing^$ and \$1"))
        draw_heading(axes, r"$x^$")
    drawn = as_svg(figure).decode()
    assert r"$\nothing^$ and \$1" in drawn
    assert "$x^$" in drawn


def test_one_console_serves_all(repository):
    """No text of others is parsed where somebody forgets to say so."""
    for path in [*repository.glob("at_smooth/**/*.py"), *repository.glob("plugins/**/*.py")]:
        source = path.read_text(encoding="utf-8")
        if path.name != "terminal.py":
            assert "rich.console import Console" not in source, path
        assert not re.search(
            r"from_markup|markup=True|rich\.markup|rich import print|\[/?(bold|dim|red|green)\b", source
        ), path
        for column in re.findall(r"TextColumn\(.*", source):
            assert "markup=False" in column or "{" not in column, path
