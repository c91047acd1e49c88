import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from at_smooth import Run, create, evaluate, load_data, load_model, results
from at_smooth.cli import cli
from at_smooth.confidence import wilson
from at_smooth.results import keep_in_run, kept_in_run

MODULE = """
import torch
from torch import nn

def net(num_classes, hidden=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def probable():
    return nn.Sequential(net(10), nn.Softmax(1))

def halved():
    return net(10).half()

def lost():
    model = net(10)
    model[1].weight.data[0, 0] = float("nan")
    return model
"""
QUICK = ("--n-examples", "20", "-E", "pgd.steps=2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a module, and room for wide tables."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(path)
    monkeypatch.setenv("COLUMNS", "160")
    yield path
    sys.modules.pop("my_models", None)


@pytest.fixture
def run(plain_run, tmp_path):
    """A finished run of the test's own."""
    return Run(shutil.copytree(plain_run.path, tmp_path / "run"))


def call(*arguments):
    return CliRunner().invoke(cli, ["evaluate", *(str(argument) for argument in arguments)])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments):
    """The message of a command that is refused: one, on standard error, and no traceback."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    return " ".join(result.stderr.split())


def found(*arguments, to="found.json"):
    succeed(*arguments, "--json", to)
    return json.loads(Path(to).read_text())


def timeless(content):
    return {**content, "results": {name: {**each, "seconds": 0} for name, each in content["results"].items()}}


def test_the_json_follows_the_contract(run, cache):
    evaluators = [word for name in ("clean", "pgd", "fgsm", "cw") for word in ("--with", name)]
    content = found(run.path, *evaluators, "--n-examples", "50", "-E", "cw.iterations=3", "--seed", "4")
    assert content["n"] == 50
    assert content["threat"] == {"norm": "Linf", "eps": 0.1}
    assert content["checkpoint"] == str(run.path / "checkpoints" / "final.pt")
    assert (content["weights"], content["part"], content["dataset"]) == ("raw", "test", "digits")
    assert (content["seed"], content["batch_size"]) == (4, 250)
    assert list(content["results"]) == ["clean", "pgd", "fgsm", "cw", "union"]
    for each in content["results"].values():
        assert 0 <= each["accuracy"] <= 100
        assert each["accuracy"] * 50 / 100 == pytest.approx(round(each["accuracy"] / 2))
        assert each["ci95"] == pytest.approx(list(wilson(each["accuracy"], 50)))
        assert each["seconds"] >= 0
    assert content["results"]["union"]["of"] == ["clean", "pgd", "fgsm"]
    assert {"success_rate", "median_l2", "accuracy_within_l2"} <= content["results"]["cw"].keys()
    [kept] = (run.path / "evaluations").glob("*.json")
    assert json.loads(kept.read_text()) == content
    assert not list(cache.rglob("*.pt"))


def test_it_is_what_python_says(run):
    content = found(run.path, "--with", "clean", "--with", "pgd", "-E", "pgd.steps=3", "--batch-size", "300")
    evaluators = {"clean": create("evaluators", "clean"), "pgd": create("evaluators", "pgd", {"steps": 3})}
    test = load_data(run.path).test
    expected = evaluate(load_model(run.path), test, evaluators, run.recipe.threat, batch_size=300).results()
    for name, evaluator in evaluators.items():
        expected[name].update(evaluator=name, options=evaluator.options())
    assert timeless(content)["results"] == timeless({"results": expected})["results"]
    assert content["results"]["clean"]["accuracy"] == pytest.approx(run.summary["raw"]["final"]["test_sa"])


def test_a_table_ends_it(run):
    evaluators = ["--with", "clean", "--with", "weak=noise", "--with", "cw", "-E", "weak.draws=2"]
    content = found(run.path, *evaluators, "--n-examples", "30", "-E", "cw.iterations=2")
    text = succeed(run.path, *evaluators, "--n-examples", "30", "-E", "cw.iterations=2")
    assert str(run.path / "checkpoints" / "final.pt") in text
    assert "30 test examples of digits, Linf, eps 0.1" in text
    for name, each in content["results"].items():
        [row] = [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
        assert row[1:5] == [f"{each['accuracy']:.2f}", f"{each['ci95'][0]:.2f}", "to", f"{each['ci95'][1]:.2f}"]
    assert f"weak: broke {content['results']['weak']['broke']['draw 1']} (draw 1), " in text
    assert "cw: success rate" in text
    assert "union: right under each of clean, weak" in text
    for name in ("clean", "weak", "cw"):
        assert f"{name}: 30/30" in text
    assert text.rstrip().splitlines()[-1].startswith("kept in ")


def test_clean_and_pgd_are_the_usual_choice(run):
    assert list(found(run.path, *QUICK)["results"]) == ["clean", "pgd", "union"]


def test_a_command_given_twice_gives_the_same(run):
    one, two = (timeless(found(run.path, "--with", "noise", "--n-examples", "60", to=name)) for name in ("a", "b"))
    assert one == two
    other = timeless(found(run.path, "--with", "noise", "--n-examples", "60", "--seed", "1", to="c"))
    assert other["results"] != one["results"]
    assert len(list((run.path / "evaluations").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "file", "kind"),
    [
        ([], "final", "smoothed"),
        (["--weights", "raw"], "final", "raw"),
        (["--weights", "smoothed", "--checkpoint", "best"], "best_smoothed", "smoothed"),
        (["--weights", "raw", "--checkpoint", "best"], "best", "raw"),
    ],
)
def test_weights_and_checkpoint_are_chosen(smoothed_run, tmp_path, arguments, file, kind):
    path = shutil.copytree(smoothed_run.path, tmp_path / "run")
    content = found(path, "--with", "clean", *arguments)
    assert (Path(content["checkpoint"]).stem, content["weights"]) == (file, kind)
    which = "best" if "best" in arguments else "final"
    assert content["results"]["clean"]["accuracy"] == pytest.approx(run_figure(smoothed_run, kind, which))


def run_figure(run, kind, which):
    return run.summary[kind][which]["test_sa"]


def test_labels_tell_evaluators_apart_and_options_find_them(run):
    content = found(
        run.path, "--n-examples", "20", "--with", "pgd-2.5=pgd", "--with", "a:b=pgd", "--with", "torchattacks:PGD",
        "-E", "pgd-2.5.steps=1", "-E", "pgd-2.5.restarts=2", "-E", "a:b.step-size=8/255", "-E", "a:b.steps=1",
        "-E", "torchattacks:PGD.steps=2", "-E", "torchattacks:PGD.random_start=false",
    )["results"]  # fmt: skip
    assert list(content) == ["pgd-2.5", "a:b", "torchattacks:PGD", "union"]
    assert list(content["pgd-2.5"]["broke"]) == ["restart 1", "restart 2"]


def test_labels_that_differ_in_a_hyphen_alone_get_options_of_their_own(run):
    arguments = ["--with", "p-1=pgd", "--with", "p_1=pgd", "--n-examples", "5", "-E", "p_1.restarts=2"]
    content = found(run.path, *arguments)["results"]
    assert "broke" in content["p_1"]
    assert "broke" not in content["p-1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--with", "pdg"], "did you mean 'pgd'"),
        (["--with", "torchattacks:PDG"], "torchattacks:PDG"),
        (["--with", "pgd", "--with", "pgd"], "a label of its own. Write LABEL=pgd"),
        (["--with", "pgd", "-E", "pdg.steps=3"], "-E pdg.steps should be EVALUATOR.OPTION=VALUE, with one of pgd"),
        (["--with", "pgd", "-E", "steps=3"], "EVALUATOR.OPTION=VALUE"),
        (["--with", "pgd", "-E", "pgd.steps"], "key=value"),
        (["--with", "pgd", "-E", "pgd.stepz=3"], "evaluator pgd: stepz: there is no such option"),
        (["--with", "pgd", "-E", "pgd.steps=many"], "evaluator pgd: steps"),
        (["--with", "torchattacks:PGD", "-E", "torchattacks:PGD.stepz=3"], "torchattacks:PGD has no option stepz"),
        (["--with", "torchattacks:PGDL2"], "measures L2"),
        (["--with", "torchattacks:PGD", "--norm", "L2", "--eps", "1"], "measures Linf, the threat is L2"),
        (["--with", "pgd", "--eps", "0"], "eps is 0"),
        (["--with", "autoattack", "--eps", "0/255"], "eps is 0"),
        (["--eps", "8"], "eps 8 is more than 1, the range of a pixel; did you mean 8/255?"),
        (["--norm", "L2", "--eps", "128"], "eps 128 is more than 8, the largest L2 distance"),
        (["--with", "pgd", "-E", "pgd.step_size=2"], "step_size: 2 is more than 1"),
        (["--with", "torchattacks:PGD", "-E", "torchattacks:PGD.alpha=2"], "alpha: 2 is more than 1"),
        (["--eps", "junk"], "neither a number nor a fraction"),
        (["--eps", "-1"], "no radius"),
        (["--norm", "L2"], "give --eps"),
        (["--norm", "L1", "--eps", "1"], "L1"),
        (["--n-examples", "0"], "--n-examples is 0"),
        (["--n-examples", "701"], "there are 700"),
        (["--n-examples", "-1"], "--n-examples is -1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--weights", "smoothed"], "no smoothed weights"),
        (["--weights", "best"], "--weights"),
        (["--checkpoint", "last"], "--checkpoint"),
        (["--dataset", "digits", "--part", "val"], "no validation part"),
        (["-D", "pool=50"], "--dataset"),
        (["-N", "hidden=3"], "not for runs"),
        (["--with", "transfer"], "source"),
        (["--with", "transfer", "-E", "transfer.source=nowhere"], "nowhere"),
        (["--json", "no/such/folder.json"], "no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_one_message(plain_run, folder, contents, arguments, words):
    before = contents(plain_run.path)
    assert words in refused(plain_run.path, *arguments)
    assert contents(plain_run.path) == before
    assert [path.name for path in folder.iterdir() if path.suffix == ".json"] == []


def test_sources_that_are_none_are_refused(plain_run, folder):
    (folder / "text.pt").write_text("no checkpoint")
    whole = (plain_run.path / "checkpoints" / "final.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    torch.save({"format": 1, "raw": Code()}, folder / "code.pt")
    assert "text.pt is no" in refused("text.pt")
    assert "half.pt is no" in refused("half.pt")
    assert "could run code" in refused("code.pt")
    assert "no checkpoint at nowhere" in refused("nowhere")
    assert "no run directory" in refused(folder)
    assert not (folder / "ran").exists()


MADE = ("--dataset", "digits", "--norm", "L2", "--eps", "0.5")


def test_a_model_of_anyones_is_evaluated(folder):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 10))
    torch.save({"state_dict": network.state_dict()}, "w.pt")
    content = found("my_models:net", *MADE, "-N", "hidden=6", "--weights-file", "w.pt", *QUICK,
                    "--with", "pgd", "--with", "clean")  # fmt: skip
    assert content["threat"] == {"norm": "L2", "eps": 0.5}
    assert (content["checkpoint"], content["dataset"], content["n"]) == ("w.pt", "digits", 20)
    whole = found("my_models:net", *MADE, "-N", "hidden=6", "--weights-file", "w.pt", "--with", "clean", to="whole")
    test = create("datasets", "digits").load(None)
    right = network(test.test.float() / 255).argmax(1) == test.test_labels
    assert whole["results"]["clean"]["accuracy"] == pytest.approx(100 * right.float().mean().item())


def test_averaged_weights_of_a_file_are_taken_and_it_is_said(folder):
    sys.path.insert(0, str(folder))
    try:
        import my_models
    finally:
        sys.path.remove(str(folder))
    state = my_models.net(10).state_dict()
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict": raw, "state_dict_ema": state}, "w.pt")
    torch.save({name: value.half() for name, value in state.items()}, "half.pt")
    clean = ["--with", "clean"]
    printed = call("my_models:net", *MADE, *clean, "--weights-file", "w.pt").stderr
    assert "note: w.pt holds raw and averaged weights; the averaged ones were taken, under 'state_dict_ema'" in printed
    files = {"w.pt": [], "half.pt": [], "zero": ["--weights-key", "state_dict"]}
    reports = {
        name: found("my_models:net", *MADE, *clean, "--weights-file", name if "." in name else "w.pt", *more,
                    to=f"{name}.json")
        for name, more in files.items()
    }  # fmt: skip
    accuracies = {name: report["results"]["clean"]["accuracy"] for name, report in reports.items()}
    bare = found("my_models:net", *MADE, *clean, to="bare.json")["results"]["clean"]["accuracy"]  # of the same weights
    assert accuracies["w.pt"] == bare != accuracies["zero"]
    assert accuracies["half.pt"] == pytest.approx(bare, abs=1)
    assert reports["w.pt"]["weights_key"] == "state_dict_ema"
    assert found("my_models:halved", *MADE, *clean, "--weights-file", "half.pt", to="h.json")["results"]["clean"][
        "accuracy"] == accuracies["half.pt"]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("net", [], "give --dataset, --norm and --eps"),
        ("net", ["--dataset", "digits", "--norm", "L2"], "give --dataset, --norm and --eps"),
        ("net", [*MADE, "--weights-file", "missing.pt"], "at missing.pt"),
        ("net", [*MADE, "--weights-key", "ema"], "name it too, with --weights-file"),
        ("net", [*MADE, "-N", "hiden=3"], "hiden"),
        ("nothing", MADE, "package.module:name"),
        ("probable", MADE, "the model gives probabilities"),
        ("lost", MADE, "not finite"),
    ],
)
def test_models_of_anyones_that_cannot_be_are_refused(target, arguments, words):
    assert words in refused(f"my_models:{target}", *arguments)


def test_a_taken_json_is_refused_before_anything_runs(plain_run, folder, monkeypatch):
    monkeypatch.setattr("at_smooth.evaluation.evaluate", lambda *_, **__: pytest.fail("it ran"))
    (folder / "taken.json").write_text("mine")
    assert "taken.json exists already" in refused(plain_run.path, "--json", "taken.json")
    assert "is a folder" in refused(plain_run.path, "--json", folder)
    assert (folder / "taken.json").read_text() == "mine"


def test_an_empty_json_may_be_written_over(run, folder):
    (folder / "found.json").touch()
    assert found(run.path, "--with", "clean", "--n-examples", "5")["n"] == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(run):
    run.path.chmod(0o500)
    try:
        assert "not kept in" in succeed(run.path, "--with", "clean")
    finally:
        run.path.chmod(0o700)


def test_a_run_that_keeps_no_evaluations_is_evaluated_all_the_same(run):
    (run.path / "evaluations").write_text("a file is in the way")
    text = succeed(run.path, "--with", "clean", "--n-examples", "5")
    assert "not kept in" in text
    assert (run.path / "evaluations").read_text() == "a file is in the way"


def test_a_cache_that_cannot_be_written_to_is_no_hindrance(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AT_SMOOTH_CACHE", str(tmp_path / "file"))
    assert found(run.path, "--with", "clean", "--n-examples", "5")["n"] == 5


def test_a_path_with_brackets_is_printed_as_it_is(run, tmp_path):
    path = run.path.rename(tmp_path / "run[bold]")
    text = succeed(path, "--with", "clean", "--n-examples", "5")
    assert str(path / "checkpoints" / "final.pt") in text


def content_of(number):
    threat = {"norm": "Linf", "eps": 0.1}
    facts = {"n": 5, "checkpoint": "final.pt", "weights": "raw", "part": "test", "dataset": "digits"}
    return {**facts, "threat": threat, "results": {}, "number": number}


def test_what_a_run_keeps_comes_back_oldest_first(tmp_path, monkeypatch):
    class Stopped(results.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(results, "datetime", Stopped)
    for number in range(12):
        keep_in_run(tmp_path, "evaluation", content_of(number))
    assert [content["number"] for content in kept_in_run(tmp_path, "evaluation")] == list(range(12))


def test_nothing_kept_is_written_over_and_junk_is_passed_over(tmp_path):
    paths = [
        keep_in_run(tmp_path, kind, content_of(number)) for number, kind in enumerate(["evaluation"] * 3 + ["audit"])
    ]
    assert len(set(paths)) == 4
    (tmp_path / "evaluations" / "evaluation-junk.json").write_text("{")
    (tmp_path / "evaluations" / "evaluation-list.json").write_text("[]")
    left_out = []
    kept = kept_in_run(tmp_path, "evaluation", left_out.append)
    assert sorted(content["number"] for content in kept) == [0, 1, 2]
    assert ["evaluation-junk.json" in str(left_out[0]), "evaluation-list.json" in str(left_out[1])] == [True, True]
    assert [content["number"] for content in kept_in_run(tmp_path, "audit")] == [3]


# Killed for real

HELD = """
import os
import time
from pathlib import Path

from at_smooth_plugins.evaluators.autoattack import AutoAttack

class Held(AutoAttack):
    def perturb(self, task, stage, images, labels):
        calls.append(stage)
        if os.environ.get("HOLD") == f"{stage} {calls.count(stage)}":
            Path(os.environ["HOLDING"]).touch()
            while True:
                time.sleep(0.01)
        return super().perturb(task, stage, images, labels)

calls = []
"""
LONG = ("--with", "autoattack=my_attacks:Held", "--n-examples", "30", "--batch-size", "4", "--eps", "0.01",
        "-E", "autoattack.attacks=[apgd-ce,apgd-dlr]", "--device", "cpu")  # fmt: skip


@pytest.fixture
def held(folder, monkeypatch):
    """AutoAttack in a module; told to, it holds at a batch for ever."""
    (folder / "my_attacks.py").write_text(HELD)
    monkeypatch.setenv("HOLDING", str(folder / "holding"))
    yield lambda moment: monkeypatch.setenv("HOLD", moment)
    sys.modules.pop("my_attacks", None)


def carried_out(path, *arguments):
    """A command that nobody disturbs: what it came to, and its batches by stage."""
    sys.modules.pop("my_attacks", None)
    content = timeless(found(path, *arguments))
    Path("found.json").unlink()
    return {**content, "checkpoint": None}, list(sys.modules["my_attacks"].calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    "blows",
    [
        [(signal.SIGKILL, -signal.SIGKILL, "apgd-ce", 2), (signal.SIGINT, 130, "apgd-dlr", 1)],
        pytest.param(
            [(signal.SIGTERM, 143, "clean", 3), (signal.SIGKILL, -signal.SIGKILL, "apgd-dlr", 2)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_evaluation_carries_on_where_it_was(
    smoothed_run, tmp_path, folder, cache, command, held, monkeypatch, blows
):
    path = shutil.copytree(smoothed_run.path, tmp_path / "run")
    expected, batches = carried_out(path, *LONG)
    shutil.rmtree(path / "evaluations")
    done = 0
    for number, code, stage, position in blows:
        stopped = batches.index(stage) + position - 1
        held(f"{stage} {position - batches[:done].count(stage)}")  # which a process counts for itself
        process = command("evaluate", path, *LONG, "--json", "found.json")
        while process.poll() is None and not (folder / "holding").exists():
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in stderr
        assert ("the same command carries on" in stderr) is (code > 0)
        assert not (folder / "found.json").exists()
        assert not (path / "evaluations").exists()
        (folder / "holding").unlink()
        assert done < stopped < len(batches)
        done = stopped
    [journal] = (cache / "evaluations").iterdir()
    monkeypatch.delenv("HOLD")
    content, rest = carried_out(path, *LONG)
    assert content == expected
    assert rest == batches[done:]
    assert not journal.exists()


@pytest.mark.slow
def test_autoattack_killed_at_any_moment_carries_on(smoothed_run, tmp_path, folder, cache, command):
    path = shutil.copytree(smoothed_run.path, tmp_path / "run")
    arguments = [path, "--with", "autoattack", "--n-examples", "40", "--batch-size", "8", "--device", "cpu"]
    expected = timeless(found(*arguments))
    journals = cache / "evaluations"
    kills = 0
    while True:
        process = command("evaluate", *arguments, "--json", "again.json")
        before = {file: file.stat().st_mtime_ns for file in journals.glob("*.pt")}
        while process.poll() is None and before == {file: file.stat().st_mtime_ns for file in journals.glob("*.pt")}:
            time.sleep(0.01)
        if kills == 3:
            assert process.wait() == 0
            break
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kills += 1
    assert timeless(json.loads((folder / "again.json").read_text())) == expected
    assert not list(journals.glob("*.pt"))


def test_another_command_does_not_carry_on_from_it(run, cache):
    one = found(run.path, "--with", "noise", *QUICK[:2], to="a")
    (cache / "evaluations").mkdir(exist_ok=True)
    stale = cache / "evaluations" / "0123456789abcdef.pt"
    stale.write_bytes(b"junk")
    assert timeless(found(run.path, "--with", "noise", *QUICK[:2], to="b")) == timeless(one)
    assert stale.exists()
