"""No file runs code that the user has not trusted, and what he trains with is trusted afterwards."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from at_smooth import (
    PluginError,
    Recipe,
    Run,
    UntrustedError,
    checkpoint,
    create,
    load_data,
    load_model,
    train,
    trust,
    trust_code,
)
from at_smooth.cli import cli

NET = """
from torch import nn

def make(num_classes, hidden=8, **others):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
"""
LEAVES_A_MARK = "import pathlib\npathlib.Path({path!r}).touch()\n"

#: What a file may name: the field, the name, and the options that go with it.
HOSTILE = {
    "a function of Python's, called with options": ("model", "os:system", {"command": "touch {mark}"}),
    "another, of a submodule": ("model", "concurrent.futures.thread:os.system", {"command": "touch {mark}"}),
    "a module that runs as it is imported": ("model", "evil:make", {}),
    "a method": ("method", "evil:Method", {}),
    "a regularizer": ("regularizer", "evil:Regularizer", {}),
    "a smoother": ("smoother", "evil:Smoother", {}),
    "a data set": ("dataset", "evil:Dataset", {}),
    "a submodule, whose package runs": ("model", "pack.leaf:make", {}),
    "a submodule that is not there": ("smoother", "pack.nothing:Smoother", {}),
    "the class of a function, by its path": ("model", "evil:make.__class__", {}),
}
#: Names that are none, which an import would take all the same.
MALFORMED = ["evil: make", "evil:make [extra]", ".evil:make", "evil:", ":make", "evil:make\n", "a:b:c"]


@pytest.fixture
def mark(tmp_path):
    """The file that is there when code of the downloaded folder has run."""
    return tmp_path / "mark"


@pytest.fixture
def here(tmp_path, monkeypatch, mark):
    """The working directory: a folder as one downloads it, with modules beside the files."""
    folder = tmp_path / "downloaded"
    (folder / "pack").mkdir(parents=True)
    for file in ("evil.py", "pack/__init__.py", "pack/leaf.py"):
        (folder / file).write_text(LEAVES_A_MARK.format(path=str(mark)) + NET)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    yield folder
    forget_modules()


@pytest.fixture(autouse=True)
def no_module_stays():
    yield
    forget_modules()


def forget_modules():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("evil", "pack", "netmod")]:
        del sys.modules[name]


@pytest.fixture
def new_process(monkeypatch):
    """What is named and imported in a process is gone in the next one."""

    def begin():
        forget_modules()
        monkeypatch.setattr(trust, "_named", set())

    return begin


@pytest.fixture
def hostile(plain_run, here, mark):
    """Makes a copy of a run whose recipe names something else, in recipe.yaml and in every checkpoint."""

    def make(field, name, options=None):
        run = here / "run"
        shutil.copytree(plain_run.path, run)
        (run / "summary.json").unlink()
        options = {key: value.format(mark=mark) for key, value in (options or {}).items()}
        changes = {field: name, f"{field}_options": options}
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        for file in run.glob("checkpoints/*.pt"):
            content = checkpoint.load(file)
            content["recipe"].update(changes)
            checkpoint.save(file, content)
        shutil.copy(run / "checkpoints" / "final.pt", run / "checkpoints" / "epoch-0004.pt")
        return run

    return make


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


COMMANDS = {
    "evaluate a run": ("evaluate", "run", "--with", "clean"),
    "evaluate a checkpoint": ("evaluate", "run/checkpoints/best.pt", "--with", "clean"),
    "evaluate, attacks made on it": ("evaluate", "good", "--with", "transfer", "-E", "transfer.source=run"),
    "audit": ("audit", "run"),
    "export": ("export", "run", "--out", "exported"),
    "transfer": ("transfer", "good", "run"),
    "average": ("average", "run", "--from", "4"),
    "analyze": ("analyze", "logits", "run"),
    "report": ("report", "run", "--figures", "logits"),
    "train by its recipe": ("train", "--recipe", "run/recipe.yaml", "--out", "new"),
    "train by its recipe, changed": ("train", "--recipe", "run/recipe.yaml", "--epochs", "1", "--out", "new"),
    "rehearse it": ("train", "--recipe", "run/recipe.yaml", "--dry-run"),
    "resume it": ("train", "--resume", "--out", "run"),
}
FUNCTIONS = {
    "load_model": lambda: load_model("run", checkpoint="best"),
    "load_data": lambda: load_data("run"),
    "from_yaml": lambda: Recipe.from_yaml(Path("run/recipe.yaml")),
    "Run": lambda: Run("run").recipe,
}


def pairs(ways, quick_ways):
    """Each way with each hostile file; all but a row and a column of them are slow together."""
    always = next(iter(HOSTILE))
    return [
        pytest.param(what, how, marks=[] if what == always or how in quick_ways else pytest.mark.slow)
        for what in HOSTILE
        for how in ways
    ]


@pytest.mark.parametrize(("what", "how"), pairs(COMMANDS, ["evaluate a run", "train by its recipe"]))
def test_a_command_imports_nothing_that_a_file_names(hostile, plain_run, here, mark, what, how):
    field, name, options = HOSTILE[what]
    hostile(field, name, options)
    (here / "good").symlink_to(plain_run.path)
    result = call(*COMMANDS[how])
    assert result.exit_code == 2, result.output
    [error] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "run/" in error
    assert f"{field} {name}" in error
    assert f"--trust {name}" in error
    assert not mark.exists()


@pytest.mark.parametrize(("what", "how"), pairs(FUNCTIONS, ["load_model"]))
def test_a_function_imports_nothing_that_a_file_names(hostile, mark, what, how):
    field, name, options = HOSTILE[what]
    hostile(field, name, options)
    with pytest.raises(UntrustedError, match=r"trust_code\(") as caught:
        FUNCTIONS[how]()
    assert f"{field} {name}" in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", MALFORMED)
def test_names_that_are_none_are_refused(hostile, mark, name):
    hostile("model", name)
    with pytest.raises(PluginError, match=r"^run/checkpoints/final\.pt: model: .* package\.module:name"):
        load_model("run")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["!!binary b3M6c3lzdGVt", "[os:system]", "{os:system: 1}"])
def test_names_of_another_type_are_refused(here, mark, kind):
    (here / "recipe.yaml").write_text(f"model: {kind}\nmodel_options: {{command: touch {mark}}}\n")
    result = call("train", "--recipe", "recipe.yaml", "--dry-run")
    assert result.exit_code == 2
    assert not mark.exists()


@pytest.mark.parametrize("part", ["for_dataset", "based_on"])
def test_parts_of_a_recipe_file_that_depend_on_others_are_refused(here, mark, part):
    named = {"model": "evil:make"}
    recipe = {"for_dataset": {"digits": named}, "dataset": "digits"} if part == "for_dataset" else {**named}
    (here / "recipe.yaml").write_text(yaml.safe_dump({"based_on": "paper", **recipe}))
    result = call("train", "--recipe", "recipe.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "recipe.yaml names code" in result.stderr
    assert not mark.exists()


def test_only_what_is_named_is_trusted(hostile, mark):
    hostile("model", "os:system", {"command": "touch {mark}"})
    for other in ("os:path.join", "os.path:join", "evil:make"):
        result = call("evaluate", "run", "--with", "clean", "--trust", other)
        assert result.exit_code == 2
        assert "os:system" in result.stderr
    assert not mark.exists()


def test_all_that_a_file_names_is_said_at_once(hostile):
    run = hostile("model", "os:system")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": "evil:Method", "smoother": "os:system"}))
    (run / "checkpoints" / "last.pt").unlink()  # or else it would say what the run was trained with
    with pytest.raises(UntrustedError, match="--trust os:system --trust evil:Method ") as caught:
        load_data("run")
    assert "model os:system, method evil:Method, smoother os:system" in str(caught.value)


@pytest.mark.parametrize("command", [("report", "run"), ("compare", "run"), ("overfitting", "run"),
                                     ("watch", "run", "--once"), ("analyze", "curves", "run")])  # fmt: skip
def test_who_looks_at_a_run_needs_none_of_its_code(hostile, plain_run, mark, command):
    run = hostile("model", "os:system", {"command": "touch {mark}"})
    summary = json.loads((plain_run.path / "summary.json").read_text())
    summary["recipe"].update(model="os:system", model_options={"command": f"touch {mark}"})
    (run / "summary.json").write_text(json.dumps(summary))
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert not mark.exists()


@pytest.mark.parametrize("field", ["model", "method", "dataset"])
@pytest.mark.parametrize("by", ["option", "recipe"])
def test_a_teacher_runs_no_code(hostile, tiny, here, mark, field, by):
    run = hostile(field, f"evil:{field}")
    teacher = str(run / "checkpoints" / "best.pt")
    recipe = {**tiny().to_dict(), "epochs": 1, "regularizer": "kd-adv"}
    options = ["-R", f"adv_teacher={teacher}"]
    if by == "recipe":
        recipe["regularizer_options"], options = {"adv_teacher": teacher}, []
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = call("train", "--recipe", "recipe.yaml", "--out", "new", *options)
    assert result.exit_code == (2 if field == "model" else 0), result.output
    assert not mark.exists()


def test_a_regularizer_cannot_trust_what_a_file_tells_it(here, mark, tiny, distribution):
    source = (
        "import at_smooth\n"
        "class Curious(at_smooth.Regularizer):\n"
        "    teacher: str\n"
        "    def setup(self, teachers):\n"
        "        teachers.get(self.teacher)\n"
    )
    distribution("curious", {"regularizers": {"curious": "curious_plugin:Curious"}}, {"curious_plugin": source})
    fields = {**tiny().to_dict(), "regularizer": "curious", "regularizer_options": {"teacher": "evil:Method"}}
    (here / "recipe.yaml").write_text(yaml.safe_dump(fields))
    for arguments in (["--dry-run"], ["--out", "new"]):
        result = call("train", "--recipe", "recipe.yaml", *arguments)
        assert result.exit_code == 2, result.output
        assert "regularizer curious names code" in result.stderr
    with pytest.raises(UntrustedError):
        create("methods", "evil:Method", trusted=False)
    assert not mark.exists()


def test_options_of_a_trusted_function_are_not_written_as_code(here, mark, tiny, new_process):
    (here / "netmod.py").write_text(NET)
    run = train(tiny(model="netmod:make", model_options={}, epochs=1), here / "run")
    final = run.checkpoint("final")
    content = checkpoint.load(final)
    text = f"x=1); import os; os.system('touch {mark}'); dict(y"
    checkpoint.save(final, {**content, "recipe": {**content["recipe"], "model_options": {text: 1}}})
    result = call("export", "run", "--out", "exported")
    assert result.exit_code in (0, 2), result.output
    assert not mark.exists()


def test_the_shape_in_a_checkpoint_is_not_written_as_code(here, mark, tiny):
    (here / "netmod.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    run = train(tiny(model="netmod:make", model_options={}, epochs=1), here / "run")
    final = run.checkpoint("final")
    content = checkpoint.load(final)
    text = f'8"""\nimport os\nos.system("touch {mark}")\n"""'
    checkpoint.save(final, {**content, "shape": [1, text, 8]})
    result = call("export", "run", "--out", "exported")
    assert result.exit_code == 2, result.output
    assert not mark.exists()


def test_labels_in_figures_are_never_given_to_latex():
    import matplotlib

    from at_smooth.style import paper_style

    with matplotlib.rc_context({"text.usetex": True}), paper_style():
        assert not matplotlib.rcParams["text.usetex"]


# What the user names, and what he has trained with.


@pytest.fixture
def own(tmp_path, monkeypatch, tiny):
    """A run on a network of one's own, trained in the folder where its module lies."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "netmod.py").write_text(NET)
    monkeypatch.chdir(folder)
    fields = ["--model", "netmod:make", "-N", "hidden=5", "-D", "pool=100", "-A", "steps=1", "--epochs", "2"]
    fields += ["--batch-size", "32", "--device", "cpu", "--set", "eval_steps=1", "--keep-checkpoints", "every=1"]
    result = call("train", *fields, "--out", "run")
    assert result.exit_code == 0, result.output
    return folder


EVALUATE = ("evaluate", "../own/run", "--with", "clean")


def test_one_s_own_run_needs_no_option(own, new_process):
    for command in (
        EVALUATE,
        ("train", "--out", "run", "--resume"),
        ("train", "--recipe", "run/recipe.yaml", "--dry-run"),
        ("export", "run", "--out", "exported"),
        ("average", "run", "--from", "1"),
        ("analyze", "logits", "run"),
        ("train", "--recipe", "run/recipe.yaml", "--regularizer", "kd-adv", "--out", "taught"),
    ):
        new_process()
        result = call(*command)
        assert result.exit_code == 0, result.output
    new_process()
    assert load_model("run")(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_an_interrupted_run_goes_on_without_an_option(own, new_process, watch):
    recipe = Run("run").recipe.replacing(epochs=3)
    halting = watch("student", 1)
    with suppress(Exception):
        train(recipe, "halted", progress=halting)
    assert not Run("halted").finished
    new_process()
    result = call("train", "--out", "halted", "--resume")
    assert result.exit_code == 0, result.output


def test_in_a_folder_with_another_module_of_that_name_it_is_refused(own, here, mark, new_process, monkeypatch):
    shutil.copy(here / "evil.py", here / "netmod.py")
    monkeypatch.chdir(here)
    new_process()
    result = call(*EVALUATE)
    assert result.exit_code == 2
    assert f"{own / 'netmod.py'}" in result.stderr
    assert f"{here / 'netmod.py'}" in result.stderr
    assert not mark.exists()
    for option in (["--trust", "netmod:make"], []):  # not trained with, so not remembered
        new_process()
        result = call(*EVALUATE, *option)
        assert result.exit_code == (0 if option else 2), result.output
    assert mark.exists()


def test_in_a_folder_without_the_module_the_message_says_where_it_was(own, new_process, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    new_process()
    result = call(*EVALUATE)
    assert result.exit_code == 2
    assert f"{own / 'netmod.py'}; there is no such module here" in result.stderr


def test_a_link_to_one_s_own_module_is_not_trusted(own, here, new_process, monkeypatch):
    (here / "netmod.py").symlink_to(own / "netmod.py")
    monkeypatch.chdir(here)
    new_process()
    assert call(*EVALUATE).exit_code == 2


def test_an_edited_module_stays_trusted(own, new_process):
    new_process()
    (own / "netmod.py").write_text(NET + "\n# edited\n")
    assert call(*EVALUATE).exit_code == 0


@pytest.mark.parametrize("how", ["command", "trust_code", "argument", "constructor", "changes"])
def test_what_the_user_names_is_trusted_in_this_process(here, mark, how, tiny, state):
    (here / "recipe.yaml").write_text("model: evil:make\n")
    if how == "command":
        assert call("train", "--recipe", "recipe.yaml", "--dry-run", "--trust", "evil:make").exit_code == 0
    elif how == "trust_code":
        trust_code(["evil:make"])
        Recipe.from_yaml(Path("recipe.yaml"))
    elif how == "argument":
        Recipe.from_yaml(Path("recipe.yaml"), trust=["evil:make"])
    elif how == "constructor":
        Recipe(model="evil:make")
    else:
        Recipe.from_yaml(Path("recipe.yaml"), {"model": "evil:make"})
    assert mark.exists()
    assert not list(state.iterdir())  # nothing was trained


def test_arguments_of_functions_that_read_runs(own, new_process, tmp_path, state):
    (state / "trusted.jsonl").unlink()
    for function in (load_model, load_data):
        new_process()
        with pytest.raises(UntrustedError):
            function("run")
        function("run", trust=["netmod:make"])


@pytest.mark.parametrize("name", ["netmod", "netmod:", "mlp", ""])
def test_the_option_wants_names_of_code(name):
    result = call("evaluate", "run", "--trust", name)
    assert result.exit_code == 2
    assert "package.module:name" in result.stderr


def test_what_installed_code_names_is_trusted(here, distribution, monkeypatch):
    (here / "netmod.py").write_text(NET)
    source = (
        "from at_smooth import create\n"
        "class Own(type(create('datasets', 'digits'))):\n"
        "    recipe = {'model': 'netmod:make'}\n"
    )
    distribution("own-data", {"datasets": {"own": "own_data:Own"}}, {"own_data": source})
    (here / "recipe.yaml").write_text("dataset: own\n")
    assert Recipe.from_yaml(Path("recipe.yaml")).model == "netmod:make"


def test_presets_of_installed_distributions_are_trusted(here, tmp_path, distribution):
    (here / "netmod.py").write_text(NET)
    package = tmp_path / "site-own-presets" / "own_presets"
    distribution("own-presets", {"recipes": {"own": "own_presets"}})
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.yaml").write_text("for_dataset:\n  digits:\n    model: netmod:make\n")
    (here / "recipe.yaml").write_text("based_on: mine\n")
    for source in ("mine", "recipe.yaml"):
        forget_modules()
        result = call("train", "--recipe", source, "--set", "dataset=digits", "--dry-run")
        assert result.exit_code == 0, result.output
        assert "netmod:make" in result.stdout


# The file in which it is remembered.


def test_the_file_names_the_code_and_is_the_user_s_alone(own, state):
    file = state / "trusted.jsonl"
    entries = [json.loads(line) for line in file.read_text().split("\n") if line]
    assert entries == [{"name": "netmod:make", "file": str(own / "netmod.py")}]
    if os.name != "nt":
        assert file.stat().st_mode & 0o077 == 0


def test_a_training_without_one_s_own_code_asks_for_no_place(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(trust, "state_file", None)
    train(tiny(epochs=1), tmp_path / "run")


def test_a_training_that_never_begins_is_not_remembered(own, state, new_process):
    before = (state / "trusted.jsonl").read_text()
    (own / "other.py").write_text(NET)
    for arguments in (["--dry-run"], ["-N", "hidden=no"], ["--device", "nowhere"], ["--lr", "-1"]):
        call("train", "--model", "other:make", "--out", "other", *arguments)
    assert (state / "trusted.jsonl").read_text() == before


BROKEN = {
    "text": b"not ours\n",
    "bytes": bytes(range(256)),
    "nested": b"[" * 100_000,
    "torn": b'{"name": "netmod:make", "fi',
    "other types": b'{"name": ["netmod:make"], "file": 3}\n7\nnull\n[]\n',
}


@pytest.mark.parametrize("content", BROKEN)
def test_lines_that_are_not_ours_are_passed_over_and_kept(own, state, content):
    file = state / "trusted.jsonl"
    file.write_bytes(BROKEN[content])
    assert trust.remember(["netmod:make"]) is None
    assert file.read_bytes().startswith(BROKEN[content])
    trust._named.clear()
    assert call(*EVALUATE).exit_code == 0


@pytest.mark.parametrize("what", ["folder", "fifo", "relative", "in a file"])
def test_a_file_that_cannot_be_written_ends_no_training(own, state, tiny, what, monkeypatch, tmp_path):
    file = state / "trusted.jsonl"
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "relative":
        monkeypatch.setenv("AT_SMOOTH_STATE", "here")
    else:
        monkeypatch.setenv("AT_SMOOTH_STATE", str(own / "netmod.py"))
    result = call("train", "--recipe", "run/recipe.yaml", "--trust", "netmod:make", "--out", "again")
    assert result.exit_code == 0, result.output
    assert "netmod:make will not be trusted next time" in result.stdout
    assert not (own / "here").exists()


def test_a_relative_home_is_no_place_for_it(monkeypatch, own):
    monkeypatch.delenv("AT_SMOOTH_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", "nowhere")
    with suppress(OSError):
        assert trust.state_file().is_absolute()


def test_the_user_s_state_directory_is_the_place(monkeypatch, tmp_path):
    monkeypatch.delenv("AT_SMOOTH_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    assert trust.state_file().name == "trusted.jsonl"
    if sys.platform == "linux":
        assert trust.state_file().parent == tmp_path / "states" / "at-smooth"


def test_processes_that_write_at_once_keep_each_other_s_entries(tmp_path, state):
    code = (
        "import sys\nfrom at_smooth import trust\nfor name in sys.argv[1:]:\n    assert trust.remember([name]) is None"
    )
    names = [[f"module{process}_{number}:make" for number in range(8)] for process in range(4)]
    for name in (name for each in names for name in each):
        (tmp_path / f"{name.partition(':')[0]}.py").touch()
    running = [subprocess.Popen([sys.executable, "-c", code, *each], cwd=tmp_path) for each in names]
    assert [process.wait(60) for process in running] == [0] * 4
    lines = (state / "trusted.jsonl").read_text().split("\n")
    assert sorted(json.loads(line)["name"] for line in lines if line) == sorted(name for each in names for name in each)


@pytest.mark.slow
def test_processes_of_the_command_find_it(own, command, here, mark, tmp_path):
    shutil.copy(here / "evil.py", here / "netmod.py")

    def ends(*arguments, cwd):
        process = command(*arguments, cwd=cwd)
        _, errors = process.communicate()
        return process.returncode, errors

    assert ends(*EVALUATE, cwd=own)[0] == 0
    assert ends("train", "--out", "run", "--resume", cwd=own)[0] == 0
    code, errors = ends(*EVALUATE, cwd=here)
    assert code == 2
    assert "--trust netmod:make" in errors
    assert not mark.exists()
    assert ends(*EVALUATE, "--trust", "netmod:make", cwd=here)[0] == 0
    assert mark.exists()
