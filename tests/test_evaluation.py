import io
import random
import threading
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from at_smooth import (
    AtSmoothWarning,
    Evaluator,
    OptionError,
    Part,
    PluginError,
    Runtime,
    Threat,
    create,
    evaluate,
    evaluation_progress,
)
from at_smooth.confidence import wilson
from at_smooth.evaluation import Watcher, classes_of
from at_smooth.journal import Journal

CPU = Runtime(torch.device("cpu"))
THREAT = Threat("Linf", 0.1)


def scripted(perturb, names=("attack",), within=True):
    """An evaluator around a function of (stage, images, labels)."""

    class Scripted(Evaluator):
        bounded: ClassVar[bool] = within

        def stages(self, task):
            return list(names)

        def perturb(self, task, stage, images, labels):
            return perturb(stage, images, labels)

    return Scripted()


def run(task, evaluators, threat=THREAT, **options):
    if isinstance(evaluators, Evaluator):
        evaluators = {"it": evaluators}
    return evaluate(task.model, task.part, evaluators, threat, runtime=CPU, **options)


@pytest.fixture(scope="module")
def binary(linear_task):
    return linear_task()


class Pixels:
    """Labels are the brighter of two pixels; the images differ in their first pixel, 0.5, 0.51, ..."""

    def __init__(self, n=10):
        self.model = nn.Flatten()
        images = torch.stack([0.5 + torch.arange(n) / 100, torch.full((n,), 0.4)], 1)
        self.part = Part(images.view(n, 2, 1, 1), torch.zeros(n, dtype=torch.long))

    @staticmethod
    def numbers(images):
        """Which images these are."""
        return ((images[:, 0].flatten() - 0.5) * 100).round().int().tolist()


def darker(images, which, by=0.3):
    """The images, some of them with another brightest pixel."""
    images = images.clone()
    for row, number in enumerate(Pixels.numbers(images)):
        images[row, 0] -= by if number in which else 0
    return images


def test_a_stage_gets_only_what_stands_in_batches_and_in_order():
    seen = []

    def perturb(stage, images, labels):
        seen.append((stage, Pixels.numbers(images)))
        assert labels.tolist() == [0] * len(images)
        return darker(images, {"one": {0, 3, 4, 9}, "two": set(), "three": {0, 1, 8}}[stage])

    found = run(Pixels(), scripted(perturb, ("one", "two", "three")), Threat("Linf", 0.3), batch_size=4)
    assert seen == [
        ("one", [0, 1, 2, 3]), ("one", [4, 5, 6, 7]), ("one", [8, 9]),
        ("two", [1, 2, 5, 6]), ("two", [7, 8]),
        ("three", [1, 2, 5, 6]), ("three", [7, 8]),
    ]  # fmt: skip
    outcome = found.outcomes["it"]
    assert outcome.broken_by.tolist() == [0, 2, -1, 0, 0, -1, -1, -1, 2, 0]
    assert outcome.broke == {"one": 4, "two": 0, "three": 2}
    assert outcome.accuracy == 40
    assert outcome.distances[outcome.broken_by >= 0].tolist() == pytest.approx([0.3] * 6)
    assert outcome.distances[outcome.standing].isinf().all()
    result = found.results()["it"]
    assert (result["accuracy"], result["ci95"]) == (40, list(wilson(40, 10)))
    assert result["broke"] == {"one": 4, "two": 0, "three": 2}
    assert "notes" not in result


def test_nothing_is_attacked_once_everything_is_broken():
    seen = []
    evaluator = scripted(lambda stage, images, labels: (seen.append(stage), 1 - images)[1], ("one", "two"))
    assert run(Pixels(), evaluator, Threat("Linf", 1)).outcomes["it"].accuracy == 0
    assert seen == ["one"]


@pytest.mark.parametrize(("norm", "eps", "length"), [("Linf", 0.3, 0.3), ("L2", 0.3, 0.3)])
def test_the_ball_reaches_to_eps_and_no_further(norm, eps, length):
    for factor, broken in ((1.0, 10), (1.001, 0)):
        evaluator = scripted(lambda stage, images, labels, by=factor * length: darker(images, range(10), by))
        outcome = run(Pixels(), evaluator, Threat(norm, eps)).outcomes["it"]
        assert (10 - int(outcome.standing.sum()), bool(outcome.notes)) == (broken, not broken)


def changed(images, value):
    images = images.clone()
    images[:, 0] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -0.01])
def test_images_that_are_no_images_do_not_count_and_leave_a_note(value):
    evaluator = scripted(lambda stage, images, labels: changed(images, value))
    outcome = run(Pixels(), evaluator, Threat("Linf", 0.8)).outcomes["it"]
    assert outcome.accuracy == 100
    [note] = outcome.notes
    assert "do not count" in note


@pytest.mark.parametrize("within", [True, False])
def test_only_bounded_evaluators_keep_to_the_radius(within):
    found = run(Pixels(), scripted(lambda stage, images, labels: darker(images, range(10)), within=within))
    assert found.outcomes["it"].accuracy == (100 if within else 0)
    assert found.bounded == (("it",) if within else ())


def test_what_was_wrong_before_is_wrong_still_where_an_attack_gives_no_image():
    task = Pixels()
    task.part.labels[:5] = 1
    spoilt = scripted(lambda stage, images, labels: images * float("nan"))
    assert run(task, spoilt).outcomes["it"].standing.tolist() == [False] * 5 + [True] * 5


def fail(*_):
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("perturb", "words"),
    [
        (fail, r"ValueError: no such luck \(.*test_evaluation.py, line \d+\)"),
        (lambda stage, images, labels: None, r"perturb\(\) returned NoneType .* should return .* \(10, 2, 1, 1\)"),
        (lambda stage, images, labels: images[:, :1], r"returned a tensor \(10, 1, 1, 1\) .* \(10, 2, 1, 1\)"),
        (lambda stage, images, labels: images[:-1], r"returned a tensor \(9, 2, 1, 1\)"),
    ],
)
def test_an_evaluator_that_fails_is_named(perturb, words):
    with pytest.raises(PluginError, match=words) as refusal:
        run(Pixels(), {"clean": create("evaluators", "clean"), "shoddy": scripted(perturb)})
    assert "evaluator 'shoddy'" in str(refusal.value)


@pytest.mark.parametrize("where", ["check", "stages", "figures"])
def test_an_evaluator_that_fails_elsewhere_is_named_too(where):
    shoddy = type("Shoddy", (type(create("evaluators", "clean")),), {where: fail, "__module__": __name__})()
    with pytest.raises(PluginError, match=r"'shoddy'.*no such luck"):
        run(Pixels(), {"shoddy": shoddy})


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_images_of_another_type_are_taken_as_they_are_meant(kind, binary):
    evaluator = scripted(lambda stage, images, labels: images.to(kind))
    assert run(binary, evaluator).outcomes["it"].accuracy == pytest.approx(100 * binary.right.float().mean(), abs=5)


def test_the_union_is_what_stands_under_every_evaluator_within_the_radius():
    ones = {name: scripted(lambda stage, images, labels, which=which: darker(images, which))
            for name, which in (("a", {0, 1}), ("b", {1, 2}))}  # fmt: skip
    far = scripted(lambda stage, images, labels: darker(images, {9}), within=False)
    found = run(Pixels(), {"far": far, **ones}, Threat("Linf", 0.3))
    assert found.union.tolist() == [False] * 3 + [True] * 7
    result = found.results()["union"]
    assert (result["accuracy"], result["of"], result["ci95"]) == (70, ["a", "b"], list(wilson(70, 10)))
    assert list(found.results()) == ["far", "a", "b", "union"]


@pytest.mark.parametrize("names", [["pgd"], ["pgd", "cw"]])
def test_there_is_no_union_of_one(binary, names):
    found = run(binary, {name: create("evaluators", name) for name in names})
    assert found.union is None
    assert list(found.results()) == names


def test_a_result_of_the_name_union_is_not_lost(binary):
    with pytest.raises(OptionError, match="union"):
        run(binary, {"union": create("evaluators", "clean"), "pgd": create("evaluators", "pgd")}).results()


def random_noise(stage, images, labels):
    return (images + 0.1 * torch.randn_like(images).sign()).clamp(0, 1)


def draws(evaluator, **options):
    """All that an evaluator draws, which the lengths of its perturbations give away."""
    return run(Pixels(64), evaluator, Threat("Linf", 1), **options).outcomes["it"].distances.tolist()


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_randomness_follows_from_the_seed(source):
    def perturb(stage, images, labels):
        noise = {
            "torch": lambda: torch.rand(len(images)),
            "numpy": lambda: torch.from_numpy(np.random.rand(len(images))).float(),
            "python": lambda: torch.tensor([random.random() for _ in images]),
        }[source]()
        return changed(images, 0.39 * noise.view(-1, 1, 1))

    evaluator = scripted(perturb)
    torch.rand(5), np.random.rand(5), random.random()
    first = draws(evaluator, seed=1)
    assert draws(evaluator, seed=1) == first
    assert draws(evaluator, seed=2) != first
    pieces = draws(evaluator, seed=1, batch_size=32)
    assert pieces[:32] != pieces[32:]


def test_stages_have_streams_of_their_own():
    seen = {}

    def perturb(stage, images, labels):
        seen[stage] = torch.rand(3).tolist()
        return images

    run(Pixels(), scripted(perturb, ("one", "two")))
    assert seen["one"] != seen["two"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_evaluation_is_in_float32(binary, kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to(kind)
    model[1].load_state_dict(binary.model[1].state_dict())
    seen = []

    class Watched(Evaluator):
        def perturb(self, task, stage, images, labels):
            seen.extend([images.dtype, task.model(images).dtype, *(each.dtype for each in task.model.parameters())])
            return images

    evaluate(model, Part(binary.part.images.double(), binary.part.labels), {"it": Watched()}, THREAT, runtime=CPU)
    assert set(seen) == {torch.float32}
    assert model[1].weight.dtype == kind


def test_evaluation_is_in_float32_under_the_callers_autocast(binary):
    seen = []

    class Watched(Evaluator):
        def perturb(self, task, stage, images, labels):
            seen.append(task.model(images).dtype)
            return images

    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(binary, Watched())
    assert seen == [torch.float32]


@pytest.mark.parametrize("name", ["fgsm", "pgd", "autoattack", "cw"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_the_caller_switched_them_off(binary, name, mode):
    few = Part(*(each[:4] for each in binary.part))
    options = {"attacks": ["apgd-ce"]} if name == "autoattack" else {}
    evaluator = {"it": create("evaluators", name, options)}
    expected = evaluate(binary.model, few, evaluator, binary.threats["Linf"], runtime=CPU)
    with mode():
        found = evaluate(binary.model, few, evaluator, binary.threats["Linf"], runtime=CPU)
    assert torch.equal(found.outcomes["it"].broken_by, expected.outcomes["it"].broken_by)


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, images):
        raise self.error


class Giving(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images.flatten(1))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Softmax(1)), "probabilities"),
        (nn.Sequential(nn.Flatten(), nn.Sigmoid()), "probabilities; .* Leave its last sigmoid out"),
        (Giving(lambda pixels: nn.functional.hardsigmoid(pixels * 9)), "Leave its last hardsigmoid out"),
        (Giving(lambda pixels: pixels * float("nan")), "not finite"),
        (Giving(lambda pixels: pixels / 0), "not finite"),
        (Giving(lambda pixels: pixels[:, :1]), r"gives \(10, 1\)"),
        (Giving(lambda pixels: pixels[:, 0]), r"gives \(10,\)"),
        (Giving(lambda pixels: pixels[:3]), r"gives \(3, 2\)"),
        (Giving(lambda pixels: (pixels, pixels)), "gives tuple"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), r"fails on images \(10, 2, 1, 1\)"),
        (Raising(TypeError("an argument is missing")), "an argument is missing"),
        (Raising(IndexError("dimension out of range")), "dimension out of range"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(model, words):
    with pytest.raises(OptionError, match=words):
        evaluate(model, Pixels().part, {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)


@pytest.mark.parametrize(
    "make", [lambda pixels: pixels.log_softmax(1), lambda pixels: pixels * 0, lambda pixels: pixels - pixels.mean()]
)
def test_unusual_logits_are_logits_all_the_same(make):
    evaluate(Giving(make), Pixels().part, {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)


def test_outputs_between_0_and_1_are_said():
    task, clean = Pixels(), {"clean": create("evaluators", "clean")}
    with pytest.warns(AtSmoothWarning, match=r"all lie in \[0, 1\] on 10 images, as those of a sigmoid do"):
        evaluate(Giving(lambda pixels: torch.sigmoid(pixels) + 0), task.part, clean, THREAT, runtime=CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Giving(lambda pixels: pixels - 0.5), task.part, clean, THREAT, runtime=CPU)


@pytest.mark.parametrize(
    "part", [torch.ones(2, requires_grad=True) * 2, threading.Lock()], ids=["tensor that is no leaf", "lock"]
)
def test_a_model_that_cannot_be_copied_is_refused(part):
    model = nn.Flatten()
    model.part = part
    with pytest.raises(OptionError, match="cannot be copied"):
        evaluate(model, Pixels().part, {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)


def test_labels_beyond_the_models_classes_are_refused():
    task = Pixels()
    task.part.labels[7] = 2
    with pytest.raises(OptionError, match="2 classes apart, but there is a label 2"):
        run(task, create("evaluators", "clean"))


@pytest.mark.parametrize(
    ("part", "evaluators", "options", "words"),
    [
        (Pixels().part, {}, {}, "no evaluator"),
        (Part(torch.rand(0, 2, 1, 1), torch.zeros(0).long()), {"clean": "clean"}, {}, "no examples"),
        (Pixels().part, {"clean": "clean"}, {"batch_size": 0}, "batch size is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(part, evaluators, options, words):
    evaluators = {label: create("evaluators", name) for label, name in evaluators.items()}
    with pytest.raises(OptionError, match=words):
        evaluate(nn.Flatten(), part, evaluators, THREAT, runtime=CPU, **options)


def test_evaluators_are_checked_before_any_of_them_runs(binary):
    seen = []
    ones = {"first": scripted(lambda stage, images, labels: (seen.append(1), images)[1], within=False)}
    type(ones["first"]).check = lambda *_: None
    with pytest.raises(OptionError, match="eps is 0"):
        run(binary, {**ones, "pgd": create("evaluators", "pgd")}, Threat("Linf", 0))
    assert not seen


def test_one_example_is_enough(binary):
    part = Part(binary.part.images[:1], binary.part.labels[:1])
    evaluators = {name: create("evaluators", name) for name in ("clean", "noise", "fgsm", "pgd", "cw")}
    evaluators["autoattack"] = create("evaluators", "autoattack", {"attacks": ["apgd-ce", "fab-t"]})
    found = evaluate(binary.model, part, evaluators, THREAT, runtime=CPU)
    assert all(len(outcome.broken_by) == 1 for outcome in found.outcomes.values())


def test_classes_are_counted(linear_task):
    assert classes_of(linear_task(classes=4).model, linear_task(classes=4).part) == 4


class StopError(Exception):
    """What an evaluation is stopped with."""


class Counting(Watcher):
    """Counts batches; stops after some."""

    def __init__(self, stop=None):
        self.batches, self.stages, self.accuracies, self._stop = 0, [], [], stop

    def stage_began(self, evaluator, stage, examples):
        self.stages.append((evaluator, stage, examples))

    def batch_done(self, examples, accuracy=None):
        self.batches += 1
        self.accuracies.append(accuracy)
        if self.batches == self._stop:
            raise StopError


EVALUATORS = {"noise": ("noise", {"draws": 3}), "pgd": ("pgd", {"restarts": 2, "steps": 3})}


def several():
    return {label: create("evaluators", name, options) for label, (name, options) in EVALUATORS.items()}


def same(one, other):
    """Two evaluations came to the same, apart from how long it took."""
    left, right = ({name: {**each, "seconds": 0} for name, each in found.results().items()} for found in (one, other))
    assert left == right
    for name, outcome in one.outcomes.items():
        assert torch.equal(outcome.broken_by, other.outcomes[name].broken_by)
        assert torch.equal(outcome.distances, other.outcomes[name].distances)


@pytest.mark.parametrize("stop", [1, 4, 9, 14, 17])
def test_a_stopped_evaluation_carries_on_from_its_last_batch(binary, tmp_path, stop):
    options = {"threat": binary.threats["Linf"], "batch_size": 9}
    whole = Counting()
    expected = run(binary, several(), watcher=whole, **options)
    assert whole.batches > 17
    with pytest.raises(StopError):
        run(binary, several(), watcher=Counting(stop), journal=Journal(tmp_path), **options)
    rest = Counting()
    journal = Journal(tmp_path)
    same(run(binary, several(), watcher=rest, journal=journal, **options), expected)
    assert stop + rest.batches == whole.batches
    assert rest.accuracies == whole.accuracies[stop:]
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_finished_evaluation_is_remembered_until_its_journal_is_closed(binary, tmp_path):
    expected = run(binary, several(), journal=Journal(tmp_path))
    again = Counting()
    same(run(binary, several(), journal=Journal(tmp_path), watcher=again), expected)
    assert again.batches == 0


class Scaled(nn.Module):
    """A model that a plain number shapes too."""

    def __init__(self, inner, sign):
        super().__init__()
        self.inner, self.sign = inner, sign

    def forward(self, images):
        return self.sign * self.inner(images)


def other_model(task):
    task.model = nn.Sequential(task.model[0], nn.Linear(12, 2))


def other_examples(task):
    task.part = Part(task.part.images.flip(0), task.part.labels.flip(0))


def other_labels(task):
    task.part = Part(task.part.images, 1 - task.part.labels)


def other_sign(task):
    task.model = Scaled(task.model.inner, -1)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (other_model, {}),
        (other_examples, {}),
        (other_labels, {}),
        (other_sign, {}),
        (None, {"seed": 1}),
        (None, {"batch_size": 5}),
        (None, {"threat": Threat("Linf", 0.2)}),
        (None, {"threat": Threat("L2", 0.1)}),
        (None, {"evaluators": {"it": create("evaluators", "noise", {"draws": 2})}}),
        (None, {"evaluators": {"it": create("evaluators", "pgd", {"steps": 3})}}),
    ],
)
def test_a_journal_is_only_for_the_very_same_evaluation(linear_task, tmp_path, change, options):
    task = linear_task()
    if change is other_sign:
        task.model = Scaled(task.model, 1)
    usual = {"evaluators": {"it": create("evaluators", "noise")}, "threat": THREAT}
    run(task, **usual, journal=Journal(tmp_path))
    if change:
        change(task)
    fresh = run(task, **{**usual, **options})
    same(run(task, **{**usual, **options}, journal=Journal(tmp_path)), fresh)


def test_the_watcher_hears_of_every_stage_and_batch(binary):
    watcher = Counting()
    found = run(binary, create("evaluators", "noise", {"draws": 2}), Threat("Linf", 0.2), batch_size=16,
                watcher=watcher)  # fmt: skip
    outcome = found.outcomes["it"]
    left = 40 - outcome.broke["draw 1"]
    assert watcher.stages == [("it", "draw 1", 40), ("it", "draw 2", left)]
    assert watcher.batches == 3 + -(-left // 16)
    assert watcher.accuracies[-1] == outcome.accuracy


def shown(terminal, monkeypatch, seconds_a_batch):
    """What progress looks like where a batch takes so long."""
    text = io.StringIO()
    clock = iter(range(0, 10**6, seconds_a_batch))
    monkeypatch.setattr(evaluation_progress.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=text, force_terminal=terminal, width=120)
    task = Pixels(8)
    with evaluation_progress.shown(console) as watcher:
        attack = scripted(lambda stage, images, labels: darker(images, {0, 1}))
        evaluate(task.model, task.part, {"it": attack}, Threat("Linf", 0.3), batch_size=2, runtime=CPU, watcher=watcher)
    return text.getvalue()


def test_progress_says_how_many_are_done_how_many_stand_and_how_long_it_takes(monkeypatch):
    lines = shown(False, monkeypatch, 20).splitlines()
    assert lines[0] == "it, attack: 2/8  75.0 % stand  left 60 s"
    assert lines[2] == "it, attack: 6/8  75.0 % stand  left 20 s"
    assert lines[-1].startswith("it: 8/8  75.0 % stand")
    assert len(lines) == 4


def test_progress_is_not_chatty(monkeypatch):
    [line] = shown(False, monkeypatch, 1).splitlines()
    assert line.startswith("it: 8/8  75.0 % stand")


def test_a_terminal_gets_a_bar(binary):
    text = io.StringIO()
    with evaluation_progress.shown(Console(file=text, force_terminal=True, width=120)) as watcher:
        run(binary, create("evaluators", "noise"), Threat("Linf", 0.2), watcher=watcher)
    assert "it, draw" in text.getvalue()
    assert "/40" in text.getvalue()
    assert "% stand" in text.getvalue()


def test_an_example_whose_logits_are_nan_is_wrong():
    class Undecided(nn.Module):
        def forward(self, images):
            logits = torch.stack([2 * images.flatten(1)[:, 0], images.flatten(1)[:, 0]], 1)
            return torch.where(logits[:, :1] > 1.8, float("nan"), logits)

    images = torch.tensor([0.8] * 70 + [0.95] * 10).view(-1, 1, 1, 1)  # the first few are fine
    found = evaluate(Undecided(), Part(images, torch.zeros(80, dtype=torch.long)),
                     {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)  # fmt: skip
    assert found.outcomes["clean"].accuracy == 87.5
    assert "NaN" in found.outcomes["clean"].notes[0]


class Trains(type(create("evaluators", "clean"))):
    """Leaves the model in train mode, as torchattacks does."""

    def perturb(self, task, stage, images, labels):
        task.model.train()
        task.model(images)
        return images


def test_an_evaluator_that_leaves_the_model_in_train_mode_changes_nothing():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    rng = torch.Generator().manual_seed(0)
    model[2].weight.data = torch.randn(3, 4, generator=rng)
    part = Part(torch.rand(30, 1, 2, 2, generator=rng), torch.arange(30) % 3)
    clean = create("evaluators", "clean")
    alone = evaluate(model, part, {"clean": clean}, THREAT, runtime=CPU, batch_size=7)
    found = evaluate(model, part, {"trains": Trains(), "clean": clean}, THREAT, runtime=CPU, batch_size=7)
    for outcome in found.outcomes.values():
        assert torch.equal(outcome.broken_by, alone.outcomes["clean"].broken_by)


@pytest.mark.parametrize(
    ("where", "gives", "words"),
    [
        ("stages", [], r"stages\(\) should return names.*not \[\]"),
        ("stages", "attack", r"stages\(\) should return names.*not 'attack'"),
        ("stages", ["a", "a"], "each once"),
        ("figures", {"accuracy": 100.0}, "accuracy"),
        ("figures", {"length": torch.ones(1)}, "cannot give its figures"),
    ],
)
def test_what_an_evaluator_says_of_itself_is_looked_at(where, gives, words):
    odd = type("Odd", (type(create("evaluators", "clean")),), {where: lambda *_: gives, "__module__": __name__})()
    with pytest.raises(PluginError, match=words):
        run(Pixels(), {"odd": odd})


def test_a_model_whose_logits_are_whole_numbers_is_refused():
    class Whole(nn.Module):
        def forward(self, images):
            return images.flatten(1).round().long()

    with pytest.raises(OptionError, match="floating point"):
        evaluate(Whole(), Part(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)),
                 {"clean": create("evaluators", "clean")}, THREAT, runtime=CPU)  # fmt: skip
