"""Thousands of broken recipes, options, checkpoints and data files: each is refused, and nothing is written over.

Every case ends in exit code 2 with one line ``Error: ...`` that names the offending field or file, or is harmless after
all (a mutation may hit nothing that matters) and ends in 0. A traceback is a failure.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from at_smooth import CheckpointError, InputError, Recipe, checkpoint, load_model
from at_smooth.cli import cli

pytestmark = pytest.mark.slow

DRY = ("--dry-run", "--device", "cpu")
MANY = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


def refused_or_harmless(arguments, names=()):
    """Run the command in this process; says whether it was refused."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert "Traceback" not in result.output
    if result.exit_code == 0:
        return False
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    if names:
        assert any(str(name) in result.stderr for name in names), result.stderr
    return True


REFUSED = []


def tally(refused, more_than):
    """Most of a test's cases are to be broken indeed."""
    assert refused > more_than
    REFUSED.append(refused)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FLOATS = st.floats(allow_subnormal=False)  # training flushes those to zero, which hypothesis notices
values = st.one_of(
    st.none(), st.booleans(), st.integers(), FLOATS, st.text(max_size=8), st.just([]), st.just({}),
    st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=3), FLOATS), max_size=3),
    st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
    st.sampled_from(["-1", "nan", "inf", "1e999", "../..", "at", "a:b", ":", "x.y:z", "0", 0, -1, 10**30, "é\u0000"]),
)  # fmt: skip
FIELDS = sorted(Recipe.model_fields)
# These may be large and still valid, and would take long or much memory to carry out.
COSTLY = {"data_dir", "device", "threads", "model_options", "dataset_options"}


def test_a_thousand_broken_recipes_are_refused(tmp_path):
    base = Recipe(dataset_options={"pool": 40}).to_dict()
    refused, cases = 0, 0

    @settings(max_examples=1000, **MANY)
    @given(st.sampled_from([*FIELDS, "nonsense", "epochs_", ""]), values, st.sampled_from([False] * 9 + [True]))
    def check(field, value, removed):
        nonlocal refused, cases
        fields = dict(base)
        if removed and field in fields:
            del fields[field]
        else:
            fields[field] = value
        cases += 1
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
        if field in COSTLY and isinstance(value, int | str) and not isinstance(value, bool):
            with_path = ("train", "--recipe", path, "--dry-run")
        else:
            with_path = ("train", "--recipe", path, *DRY)
        refused += refused_or_harmless(with_path, [field, field.removesuffix("_options"), path])
        assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]

    check()
    assert cases >= 1000
    tally(refused, more_than=400)


def test_three_hundred_mutations_of_a_recipes_text_are_refused_or_harmless(tmp_path):
    text = Recipe(dataset_options={"pool": 40}).to_yaml().encode()
    draw = random.Random(0)
    refused = 0
    path = tmp_path / "recipe.yaml"
    for _ in range(300):
        broken = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            spot = draw.randrange(len(broken))
            broken[spot : spot + draw.randint(0, 3)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
        path.write_bytes(broken)
        refused += refused_or_harmless(("train", "--recipe", path, *DRY))
        assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]
    tally(refused, more_than=150)


def test_eight_hundred_option_strings_are_refused_or_harmless(tmp_path):
    refused = cases = 0
    keys = st.one_of(  # not width: a network of any width is no mistake, and takes its time
        st.sampled_from(["pool", "depth_", "steps", "step_size", "alpha", "start", "every", "beta", "mode", "crop"]),
        st.text(max_size=6),
    )
    scalars = st.one_of(
        st.text(max_size=8), st.integers(-5, 5).map(str), FLOATS.map(str),
        st.sampled_from(["[1", "{a: b}", "!!python/object/apply:os.mkdir [owned]", "&a *a", "- x", "null", "~"]),
    )  # fmt: skip

    @settings(max_examples=800, **MANY)
    @given(st.sampled_from(["-D", "-N", "-M", "-A", "-R", "-S", "--set"]), keys, scalars, st.booleans())
    def check(letter, key, value, equals):
        nonlocal refused, cases
        cases += 1
        option = f"{key}={value}" if equals else f"{key}{value}"
        plugins = ("--smoother", "swa", "--regularizer", "tf-kd", "--method", "trades")
        refused += refused_or_harmless(("train", *plugins, "-D", "pool=40", letter, option, *DRY))
        assert not list(tmp_path.iterdir())

    check()
    assert cases >= 800
    tally(refused, more_than=300)


class Owned:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def mutations(content, rewrite, count, seed=0):
    """Broken copies of a checkpoint, as bytes, each with what was done to it."""
    draw = random.Random(seed)
    for number in range(count):
        kind = ("cut", "flip", "junk", "code", "missing", "wrong", "shape", "dtype")[number % 8]
        broken = bytearray(content)
        if kind == "cut":
            broken = broken[: draw.randrange(len(broken))]
        elif kind == "flip":
            for _ in range(draw.choice([1, 5])):
                broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        elif kind == "junk":
            spot = draw.randrange(len(broken))
            broken[spot : spot + 64] = bytes(draw.randrange(256) for _ in range(64))
        else:
            broken = rewrite(kind, draw)
        yield kind, bytes(broken)


def rewriting(path, folder):
    """Changes what a checkpoint holds; the check sum is right again."""

    def places(value, trail=()):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield (*trail, key)
                yield from places(inner, (*trail, key))

    def rewrite(kind, draw):
        content = checkpoint.load(path)
        if kind == "code":
            if draw.random() < 0.5:
                return pickle.dumps({"format": checkpoint.FORMAT, "raw": Owned()})
            file = io.BytesIO()
            torch.save({"format": checkpoint.FORMAT, **content, "raw": Owned()}, file)
            return file.getvalue()
        else:
            trail = draw.choice(sorted(places(content), key=str))
            parent = content
            for key in trail[:-1]:
                parent = parent[key]
            value = parent[trail[-1]]
            if kind == "missing":
                del parent[trail[-1]]
            elif kind == "wrong" or not isinstance(value, torch.Tensor):
                parent[trail[-1]] = draw.choice([None, "text", -7, 1e9, [], {}, [1, 2], torch.zeros(3), {"a": 1}])
            elif kind == "shape":
                parent[trail[-1]] = torch.zeros(draw.choice([(1,), (2, 3), (0,), (7, 7, 7)]))
            else:
                parent[trail[-1]] = value.to(draw.choice([torch.bool, torch.complex64, torch.int64]))
        checkpoint.save(folder / "rewritten.pt", content)
        return (folder / "rewritten.pt").read_bytes()

    return rewrite


def test_four_hundred_broken_checkpoints_are_refused_and_run_nothing(plain_run, tmp_path, tmp_path_factory):
    source = plain_run.checkpoint("best")
    path = tmp_path / "broken.pt"
    refused = 0
    for kind, content in mutations(source.read_bytes(), rewriting(source, tmp_path_factory.mktemp("rewritten")), 400):
        path.write_bytes(content)
        error = None
        try:
            load_model(path)
        except InputError as caught:
            error = caught
        refused += error is not None
        assert error or kind not in ("cut", "code"), kind
        assert error is None or isinstance(error, CheckpointError) or re.search(r"\w+: ", str(error))
        assert [each.name for each in tmp_path.iterdir()] == ["broken.pt"]
        assert path.read_bytes() == content
    tally(refused, more_than=250)


def test_two_hundred_broken_teachers_are_refused(plain_run, tmp_path, tmp_path_factory):
    source = plain_run.checkpoint("best")
    path = tmp_path / "teacher.pt"
    options = ("-D", "pool=100", "-N", "width=8", "-N", "depth=1", "--epochs", "4", "-A", "steps=2")
    refused = 0
    for _, content in mutations(
        source.read_bytes(), rewriting(source, tmp_path_factory.mktemp("rewritten")), 200, seed=1
    ):
        path.write_bytes(content)
        refused += refused_or_harmless(
            ("train", *options, "--regularizer", "kd-adv", "-R", f"adv_teacher={path}", *DRY), [path]
        )
        assert [each.name for each in tmp_path.iterdir()] == ["teacher.pt"]
    tally(refused, more_than=100)


def test_two_hundred_broken_states_are_refused_and_left_alone(tmp_path, stopped_run, contents, tmp_path_factory):
    _, run = stopped_run(after=3, epochs=4, smoother="swa")
    last = run / "checkpoints" / "last.pt"
    good = last.read_bytes()
    refused = 0
    pristine = tmp_path / "pristine"
    shutil.copytree(run, pristine)
    for _, content in mutations(good, rewriting(last, tmp_path_factory.mktemp("rewritten")), 200, seed=2):
        last.write_bytes(content)
        before = contents(run)
        if refused_or_harmless(("train", "--out", run, "--resume"), [last, run]):
            refused += 1
            now = contents(run)
            assert {name: now.get(name) for name in before} == before
        else:
            shutil.rmtree(run)
            shutil.copytree(pristine, run)
        last.write_bytes(good)
    tally(refused, more_than=100)


def test_two_hundred_broken_arrays_are_refused(npz, tmp_path):
    good = npz().read_bytes()
    draw = random.Random(3)
    path = tmp_path / "broken.npz"
    (tmp_path / "arrays-0.npz").unlink()
    rng = np.random.default_rng(0)
    strange = [
        np.array(3), np.zeros((0,)), np.zeros((3, 3)), np.array(["a", "b"]), np.array([object()], dtype=object),
        np.full((40, 6, 6), np.nan), np.full((40, 6, 6), -1.0), np.zeros((40, 6, 6), np.int16), np.zeros((40, 6, 6, 6)),
        np.arange(40) - 1, np.arange(40) * 10**12, np.zeros(40), np.zeros(40, complex), np.zeros((40, 2), int),
        np.zeros((39, 6, 6), np.uint8), np.zeros((40, 0, 0), np.uint8), np.zeros((40, 1, 1), np.uint8),
        rng.random((40, 5, 6)), np.zeros(40, bool), np.zeros(40, "datetime64[s]"), np.arange(40).astype(np.uint64),
    ]  # fmt: skip
    refused = 0
    for number in range(200):
        if number % 2:
            name = draw.choice(["x_train", "y_train", "x_test", "y_test"])
            arrays = dict(np.load(io.BytesIO(good)))
            arrays[name] = draw.choice(strange)
            np.savez(path, **arrays)
        else:
            broken = bytearray(good)
            for _ in range(draw.randint(1, 20)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            path.write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        model = ("--model", "mlp", "-N", "width=4")
        refused += refused_or_harmless(
            ("train", "--dataset", "npz", "--data-dir", path, *model, *DRY),
            [path, "training set", "test set", "training images", "recipe"],
        )
        assert [each.name for each in tmp_path.iterdir()] == ["broken.npz"]
    tally(refused, more_than=120)


def test_a_hundred_broken_image_folders_are_refused(tmp_path):
    draw = random.Random(4)
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for part, classes in (("train", "ab"), ("test", "ab")):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(3):
                image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
                image.save(folder / part / name / f"{number}.png")
    files = sorted(folder.rglob("*.png"))
    refused = 0
    for _ in range(100):
        file = draw.choice(files)
        good = file.read_bytes()
        broken = bytearray(good)
        for _ in range(draw.randint(1, 12)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        file.write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        arguments = ("train", "--dataset", "folder", "--data-dir", folder, "--model", "mlp", "-N", "width=4", *DRY)
        refused += refused_or_harmless(arguments, [file, folder])
        file.write_bytes(good)
    tally(refused, more_than=50)


def test_a_hundred_broken_run_directories_are_refused_by_compare(plain_run, tmp_path, contents):
    run = tmp_path / "run"
    shutil.copytree(plain_run.path, run)
    draw = random.Random(5)
    path = run / "summary.json"
    good = json.loads(path.read_text())
    refused = 0
    for number in range(100):
        broken = json.loads(json.dumps(good))
        parent = broken
        while True:
            key = draw.choice(sorted(parent))
            if isinstance(parent[key], dict) and parent[key] and draw.random() < 0.6:
                parent = parent[key]
                continue
            break
        if number % 2:
            del parent[key]
        else:
            parent[key] = draw.choice([None, "text", -7, [], {}, {"a": 1}])
        path.write_text(json.dumps(broken))
        before = contents(run)
        refused += refused_or_harmless(("compare", run, plain_run.path), [path])
        assert contents(run) == before
    tally(refused, more_than=50)


def test_an_archive_with_a_wrong_check_sum_is_refused(plain_run, tmp_path):
    path = tmp_path / "flipped.pt"
    content = bytearray(plain_run.checkpoint("best").read_bytes())
    with zipfile.ZipFile(plain_run.checkpoint("best")) as archive:
        largest = max(
            (each for each in archive.infolist() if "/data/" in each.filename), key=lambda each: each.file_size
        )
    name, extra = struct.unpack_from("<HH", content, largest.header_offset + 26)
    content[largest.header_offset + 30 + name + extra + largest.file_size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="check sum"):
        load_model(path)


def test_two_thousand_of_them_were_broken_indeed():
    if len(REFUSED) < 9:
        pytest.skip("not all of them were run")
    assert sum(REFUSED) >= 2000
