import copy
import shutil

import pytest
import torch

from at_smooth import CheckpointError, InputError, Run, Runtime, checkpoint, load_data, load_model, train
from at_smooth.teacher_cache import cache_directory
from at_smooth.teachers import Kinship, SelfTeachers, teacher_key, teacher_recipe

BOTH = {"regularizer": "kd-std-adv"}


def test_the_first_run_trains_and_the_second_reuses(tiny, tmp_path, watch, cache, assert_same_outcome):
    first, second = watch(), watch()
    one = train(tiny(**BOTH), tmp_path / "one", progress=first)
    assert set(first.roles) == {"student", "standard teacher", "at teacher"}
    assert len(list((cache / "teachers").iterdir())) == 2
    two = train(tiny(**BOTH), tmp_path / "two", progress=second)
    assert second.roles == ["student"]
    assert_same_outcome(one, two)


@pytest.mark.parametrize(
    ("regularizer", "roles"), [("none", set()), ("kd-std", {"standard teacher"}), ("kd-adv", {"at teacher"})]
)
def test_only_the_teachers_that_are_needed_are_trained(tiny, tmp_path, watch, regularizer, roles):
    progress = watch()
    train(tiny(regularizer=regularizer), tmp_path / "run", progress=progress)
    assert set(progress.roles) == {"student"} | roles


def test_a_teacher_is_the_students_recipe_by_another_method(tiny):
    recipe = tiny(regularizer="kd-std-adv", smoother="swa", epochs=7, seed=3, eps=0.1)
    teacher = teacher_recipe(recipe, "standard")
    same = {"method": "standard", "regularizer": "none", "smoother": "none", "test_every": 0}
    left_out = {"regularizer_options", "smoother_options", "method_options"}
    assert {k: v for k, v in teacher.to_dict().items() if k not in left_out} == {
        **{k: v for k, v in recipe.to_dict().items() if k not in left_out},
        **same,
    }
    assert teacher.regularizer_options == teacher.smoother_options == {}


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, False),
        ({"regularizer": "kd-adv"}, False),
        ({"smoother": "swa"}, False),
        ({"test_every": 3}, False),
        ({"device": "auto"}, False),
        ({"seed": 1}, True),
        ({"epochs": 5}, True),
        ({"lr": 0.2}, True),
        ({"eps": 0.3}, True),
        ({"model_options": {"width": 9}}, True),
        ({"model": "convnet", "model_options": {}}, True),
        ({"dataset_options": {"pool": 60}}, True),
        ({"precision": "bf16"}, True),
    ],
    ids=str,
)
def test_the_key_changes_with_what_shapes_a_teacher_alone(tiny, changes, shapes):
    before, after = (teacher_key(teacher_recipe(recipe, "at"), "data") for recipe in (tiny(), tiny(**changes)))
    assert (before != after) == shapes


def test_the_key_changes_with_method_and_data(tiny):
    recipe = tiny()
    keys = {teacher_key(teacher_recipe(recipe, method), data) for method in ("at", "standard") for data in ("a", "b")}
    assert len(keys) == 4


def test_another_seed_trains_teachers_of_its_own(tiny, tmp_path, watch):
    train(tiny(regularizer="kd-adv"), tmp_path / "one")
    progress = watch()
    train(tiny(regularizer="kd-adv", seed=1), tmp_path / "two", progress=progress)
    assert "at teacher" in progress.roles


def test_a_run_stands_without_the_cache(tiny, tmp_path, watch, cache, stopped_run, assert_same_outcome):
    whole = train(tiny(**BOTH), tmp_path / "whole")
    recipe, path = stopped_run(**BOTH)
    shutil.rmtree(cache)
    progress = watch()
    continued = train(recipe, path, resume=True, progress=progress)
    assert progress.roles == ["student"]
    assert_same_outcome(whole, continued)


def test_a_run_does_not_suffer_from_damage_to_the_cache(tiny, tmp_path, cache):
    run = train(tiny(regularizer="kd-adv"), tmp_path / "run")
    for path in (cache / "teachers").rglob("*.pt"):
        path.unlink()
    assert load_model(run.path / "teachers" / "at", checkpoint="best")


def test_an_unwritable_cache_is_no_obstacle(tiny, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("AT_SMOOTH_CACHE", str(blocked))
    assert train(tiny(regularizer="kd-adv"), tmp_path / "run").finished
    assert blocked.read_text() == "not a folder"


def test_an_interrupted_teacher_is_continued(tiny, tmp_path, stopped_run, watch, cache, assert_same_outcome):
    whole = train(tiny(regularizer="kd-adv"), tmp_path / "whole")
    shutil.rmtree(cache)
    recipe, path = stopped_run(stop="at teacher", regularizer="kd-adv")
    assert not list((cache / "teachers").iterdir())
    progress = watch()
    assert_same_outcome(whole, train(recipe, path, resume=True, progress=progress))
    assert "at teacher" in progress.roles


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_teacher_may_be_brought_along(tiny, plain_run, tmp_path, watch, what):
    teacher = plain_run.path if what == "run" else plain_run.checkpoint("best")
    progress = watch()
    options = {"adv_teacher": str(teacher)}
    run = train(tiny(regularizer="kd-adv", regularizer_options=options), tmp_path / "run", progress=progress)
    assert progress.roles == ["student"]
    copied = torch.load(run.path / "teachers" / "at" / "checkpoints" / "best.pt", weights_only=True)["raw"]
    best = torch.load(plain_run.checkpoint("best"), weights_only=True)["raw"]
    assert all(torch.equal(copied[name], tensor) for name, tensor in best.items())


def test_a_run_stands_without_the_teacher_that_was_brought(tiny, plain_run, tmp_path, stopped_run):
    lent = tmp_path / "lent"
    shutil.copytree(plain_run.path, lent)
    recipe, path = stopped_run(regularizer="kd-adv", regularizer_options={"adv_teacher": str(lent)})
    shutil.rmtree(lent)
    assert train(recipe, path, resume=True).finished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "other data or another split .*seed 0; the student's: digits, seed 1"),
        ({"dataset_options": {"pool": 60}}, "other data or another split"),
        ({"model_options": {"width": 9, "depth": 1}}, "its model options is .*'width': 8.*'width': 9"),
        ({"model": "convnet", "model_options": {"width": 4}}, "its model is mlp, the student's is convnet"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit_is_refused_with_the_reason(tiny, plain_run, tmp_path, changes, words):
    options = {"adv_teacher": str(plain_run.path)}
    with pytest.raises(CheckpointError, match=words):
        train(tiny(regularizer="kd-adv", regularizer_options=options, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("checkpoints/last.pt", "no weights to teach with"),
        ("missing", "no checkpoint at"),
        ("summary.json", r"summary\.json"),
    ],
)
def test_what_is_no_teacher_is_refused(tiny, plain_run, tmp_path, teacher, words):
    options = {"adv_teacher": str(plain_run.path / teacher)}
    with pytest.raises(CheckpointError, match=words):
        train(tiny(regularizer="kd-adv", regularizer_options=options), tmp_path / "run")


def test_a_teacher_learns_from_the_students_split(smoothed_run):
    student = load_data(smoothed_run.path)
    for method in ("at", "standard"):
        assert load_data(smoothed_run.path / "teachers" / method).fingerprint() == student.fingerprint()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_is_in_eval_mode_without_gradients_and_answers_as_under_autocast(precision):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    images, runtime = torch.rand(5, 1, 4, 4), Runtime.choose("cpu", precision)
    with torch.no_grad(), runtime.autocast():
        expected = copy.deepcopy(runtime.place(model)).eval()(images)
    teacher = runtime.teacher(model)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(images), expected)  # outside a region of autocast too
    with torch.no_grad(), runtime.autocast():
        assert torch.equal(teacher(images), expected)


def test_the_cache_is_the_users_unless_named(monkeypatch, tmp_path, cache):
    assert cache_directory() == cache
    monkeypatch.delenv("AT_SMOOTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "at-smooth"
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "at-smooth"


def overwrite(path, other):
    """Change a file in place, as cp does."""
    with path.open("r+b") as file:
        file.truncate()
        file.write(other.read_bytes())


@pytest.fixture
def others(tiny, tmp_path):
    """A run whose checkpoints fit those of others, and hold other weights."""
    return train(tiny(lr=0.01), tmp_path / "others")


def test_a_teacher_that_is_copied_over_changes_no_run(
    tiny, plain_run, others, tmp_path, stopped_run, assert_same_outcome
):
    mine = tmp_path / "my.pt"
    shutil.copy(plain_run.checkpoint("best"), mine)
    changes = {"regularizer": "kd-adv", "regularizer_options": {"adv_teacher": str(mine)}}
    whole = train(tiny(**changes), tmp_path / "whole")
    recipe, path = stopped_run(**changes)
    overwrite(mine, others.checkpoint("best"))
    assert_same_outcome(whole, train(recipe, path, resume=True))


def test_a_cached_teacher_that_is_changed_in_place_changes_no_run(
    tiny, others, tmp_path, cache, stopped_run, assert_same_outcome
):
    whole = train(tiny(regularizer="kd-adv"), tmp_path / "whole")  # which put the teacher there
    recipe, path = stopped_run(regularizer="kd-adv")  # which took it from there
    (kept,) = (cache / "teachers").glob("*/checkpoints/best.pt")
    overwrite(kept, others.checkpoint("best"))
    assert_same_outcome(whole, train(recipe, path, resume=True))
    teaching = "teachers/at/checkpoints/best.pt"
    assert (whole.path / teaching).read_bytes() == (path / teaching).read_bytes() != kept.read_bytes()


def test_teachers_of_one_method_from_two_files_are_two(plain_run, tmp_path):
    best, other = plain_run.checkpoint("best"), tmp_path / "other.pt"
    content = checkpoint.load(best)
    checkpoint.save(other, {**content, "raw": {name: 2 * value for name, value in content["raw"].items()}})
    kinship = Kinship(plain_run.recipe, content["fingerprint"], tuple(content["shape"]), content["num_classes"])
    images = torch.rand(4, *content["shape"])
    for _ in range(2):  # a resumed run asks in the same order
        teachers = SelfTeachers(kinship, tmp_path / "teachers", Runtime.choose("cpu"), print, print)
        one, two, again = (teachers.get("at", path)(images) for path in (best, other, best))
        assert torch.equal(one, again)
        assert not torch.equal(one, two)


def test_another_teacher_in_the_run_is_refused(plain_run, others, stopped_run):
    changes = {"regularizer": "kd-adv", "regularizer_options": {"adv_teacher": str(plain_run.path)}}
    recipe, path = stopped_run(**changes)
    own = path / "teachers" / "at" / "checkpoints" / "best.pt"
    shutil.copy(others.checkpoint("best"), own)
    with pytest.raises(CheckpointError, match=r"at/checkpoints/best\.pt does not hold the weights that this run"):
        train(recipe, path, resume=True)
    shutil.copy(plain_run.checkpoint("best"), own)
    assert train(recipe, path, resume=True).finished


@pytest.mark.slow
def test_two_runs_at_once_train_each_teacher_once(command, cache, tmp_path, assert_same_outcome):
    options = ["-D", "pool=100", "-N", "width=8", "-A", "steps=2", "--epochs", "4", "--regularizer", "kd-std-adv"]
    both = [command("train", *options, "--out", str(tmp_path / name)) for name in ("one", "other")]
    said = ""
    for process in both:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        said += out
    assert said.count("trained first, then cached") == 2
    assert_same_outcome(Run(tmp_path / "one"), Run(tmp_path / "other"))
    assert len(list((cache / "teachers").iterdir())) == 2  # nothing half-written is left over


def test_a_damaged_teacher_in_the_cache_is_trained_again(tiny, tmp_path, watch, cache, assert_same_outcome):
    one = train(tiny(regularizer="kd-adv"), tmp_path / "one")
    (kept,) = (cache / "teachers").iterdir()
    (kept / "checkpoints" / "best.pt").unlink()
    (kept / "checkpoints" / "best.pt").write_bytes(b"cut short")
    again, reused = watch(), watch()
    assert_same_outcome(one, train(tiny(regularizer="kd-adv"), tmp_path / "two", progress=again))
    assert set(again.roles) == {"at teacher", "student"}
    train(tiny(regularizer="kd-adv"), tmp_path / "three", progress=reused)
    assert reused.roles == ["student"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adv_teacher": "missing"}, "no checkpoint"),
        ({"adv_attack": "nonsense"}, "no attack 'nonsense'"),
        ({"adv_attack": "fgsm", "adv_steps": 5}, "steps"),
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_is_refused_before_the_other_is_trained(tiny, tmp_path, watch, options, words):
    watching = watch()
    with pytest.raises(InputError, match=words):
        train(tiny(**BOTH, regularizer_options=options), tmp_path / "run", progress=watching)
    assert watching.roles == []
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused(tiny, tmp_path, npz):
    data = {"dataset": "npz", "data_dir": npz()}
    teacher = train(tiny(**data, dataset_options={"num_classes": 2}, epochs=1), tmp_path / "teacher")
    student = tiny(**data, dataset_options={"num_classes": 3}, epochs=1, regularizer="kd-adv",
                   regularizer_options={"adv_teacher": str(teacher.path)})  # fmt: skip
    with pytest.raises(CheckpointError, match="number of classes is 2, the student's is 3"):
        train(student, tmp_path / "student")
