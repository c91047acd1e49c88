"""Miniature data sets, each in the format in which the true one is published."""

import hashlib
import math
import os
import pickle
import struct
import tarfile
import urllib.request
import warnings
import zlib
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from scipy.io import savemat

from at_smooth import AtSmoothWarning, Data, DataError, OptionError, Recipe, create, train
from at_smooth.cli import cli
from at_smooth.registry import load

DOWNLOADED = ["cifar10", "cifar100", "svhn", "stl10"]
FILES = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "stl10": "stl10_binary.tar.gz",
}


@pytest.fixture(autouse=True)
def requested(monkeypatch):
    """There is no network; the addresses that were asked for."""
    addresses = []

    def refuse(request, *_, **__):
        addresses.append(request if isinstance(request, str) else request.full_url)
        raise URLError("there is no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return addresses


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(n, height, width, seed):
    """(N, 3, H, W) uint8, no two pixels of an image alike in a way that a transposition would hide."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as byte strings, as Python 2 wrote the CIFAR batches."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text.encode() if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def write_pickle(path, content):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def cifar_files(folder, meta, key, batches):
    """Batches of (name, images, labels), and the file of the class names."""
    folder.mkdir(parents=True)
    for name, images, labels in batches:
        rows = images.reshape(len(images), -1)  # a row is red, green, blue, each 32 rows of 32
        names = [f"image_{number}.png" for number in range(len(rows))]
        extra = {"coarse_labels": [0] * len(rows)} if key == "fine_labels" else {}
        write_pickle(
            folder / name, {"batch_label": name, key: labels.tolist(), "data": rows, "filenames": names, **extra}
        )
    kind = "fine_label_names" if key == "fine_labels" else "label_names"
    write_pickle(folder / meta, {kind: [f"class {number}" for number in range(10)]})


def packed(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


class Miniature:
    """A data set on disk, and what it should be read as.

    Attributes:
        root: For ``--data-dir``.
        parts: Images and labels of the training and the test part.
    """

    def __init__(self, root, parts):
        self.root, self.parts = root, parts


def make_cifar10(root, patch):
    (x, y), (x_test, y_test) = parts = (
        (pixels(40, 32, 32, 0), np.arange(40) % 10),
        (pixels(10, 32, 32, 1), np.arange(10)),
    )
    train_batches = [(f"data_batch_{i + 1}", x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]) for i in range(5)]
    own = torchvision.datasets.CIFAR10
    folder = root / "cifar-10-batches-py"
    cifar_files(folder, "batches.meta", "labels", [*train_batches, ("test_batch", x_test, y_test)])
    patch.setattr(own, "train_list", [[name, md5(folder / name)] for name, _, _ in train_batches])
    patch.setattr(own, "test_list", [["test_batch", md5(folder / "test_batch")]])
    patch.setattr(own, "meta", {**own.meta, "md5": md5(folder / "batches.meta")})
    return parts


def make_cifar100(root, patch):
    (x, y), (x_test, y_test) = parts = (
        (pixels(40, 32, 32, 2), np.arange(40) * 7 % 100),
        (pixels(10, 32, 32, 3), 99 - np.arange(10)),
    )
    own = torchvision.datasets.CIFAR100
    folder = root / "cifar-100-python"
    cifar_files(folder, "meta", "fine_labels", [("train", x, y), ("test", x_test, y_test)])
    patch.setattr(own, "train_list", [["train", md5(folder / "train")]])
    patch.setattr(own, "test_list", [["test", md5(folder / "test")]])
    patch.setattr(own, "meta", {**own.meta, "md5": md5(folder / "meta")})
    return parts


def make_svhn(root, patch):
    parts = (pixels(40, 32, 32, 4), np.arange(40) % 10), (pixels(10, 32, 32, 5), np.arange(10))
    own, sums = torchvision.datasets.SVHN, {}
    root.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(("train", "test"), parts, strict=True):
        path = root / f"{name}_32x32.mat"
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]  # 10 stands for 0
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": digits})
        sums[name] = [own.split_list[name][0], path.name, md5(path)]
    patch.setattr(own, "split_list", {**own.split_list, **sums})
    return parts


def make_stl10(root, patch):
    parts = (pixels(20, 96, 96, 6), np.arange(20) % 10), (pixels(10, 96, 96, 7), np.arange(10))
    own = torchvision.datasets.STL10
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, (images, labels) in zip(("train", "test"), parts, strict=True):
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # column by column
        (folder / f"{name}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(pixels(2, 96, 96, 8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {number}" for number in range(10)) + "\n")
    for files in ("train_list", "test_list"):
        patch.setattr(own, files, [[name, md5(folder / name)] for name, _ in getattr(own, files)])
    return parts


MAKERS = {"cifar10": make_cifar10, "cifar100": make_cifar100, "svhn": make_svhn, "stl10": make_stl10}


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """Writes one of torchvision's data sets, unpacked; torchvision is told the miniature's checksums."""
    return lambda name: Miniature(tmp_path / name, MAKERS[name](tmp_path / name, monkeypatch))


def assert_same(images, parts):
    (x, y), (x_test, y_test) = parts
    for found, expected in ((images.train, x), (images.test, x_test)):
        assert found.dtype == torch.uint8
        assert np.array_equal(found, expected)
    for found, expected in ((images.train_labels, y), (images.test_labels, y_test)):
        assert found.dtype == torch.int64
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("svhn", 10), ("stl10", 10)])
def test_a_published_data_set_is_read_without_a_network(miniature, requested, name, classes):
    made = miniature(name)
    images = create("datasets", name).load(made.root)
    assert_same(images, made.parts)
    assert images.num_classes == classes
    assert requested == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_an_archive_is_unpacked_where_it_lies(miniature, requested, monkeypatch, tmp_path, name):
    made = miniature(name)
    (folder,) = made.root.iterdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    packed(folder, elsewhere / FILES[name])
    own = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name]
    monkeypatch.setattr(getattr(torchvision.datasets, own), "tgz_md5", md5(elsewhere / FILES[name]))
    assert_same(create("datasets", name).load(elsewhere), made.parts)
    assert requested == []


def test_without_a_folder_the_users_cache_is_looked_at(miniature, cache):
    made = miniature("svhn")
    made.root.rename(cache / "data")
    assert_same(create("datasets", "svhn").load(None), made.parts)


def train_briefly(tmp_path, **fields):
    return train(
        Recipe(
            **fields,
            model="convnet",
            model_options={"width": 2, "stages": 2},
            attack_options={"steps": 1},
            epochs=1,
            batch_size=16,
            eval_steps=1,
            device="cpu",
            threads=1,
        ),
        tmp_path / "run",
    )


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_published_data_set_trains(miniature, tmp_path, name):
    run = train_briefly(tmp_path, dataset=name, data_dir=miniature(name).root)
    (row,) = run.history
    assert all(0 <= row[figure] <= 100 for figure in ("val_sa", "val_ra", "test_sa", "test_ra"))


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_a_network_the_message_says_which_files_go_where(tmp_path, requested, name):
    with pytest.raises(DataError) as caught:
        create("datasets", name).load(tmp_path / "data")
    assert requested
    assert f"Put {FILES[name]} into {tmp_path / 'data'}" in str(caught.value)
    assert "there is no network" in str(caught.value)
    assert "--data-dir" in str(caught.value)


def planned(*arguments):
    result = CliRunner().invoke(cli, ["train", "--dry-run", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", [*DOWNLOADED, "tiny-imagenet"])
def test_a_dry_run_goes_by_the_published_size_and_downloads_nothing(name, requested, cache):
    text = planned("--dataset", name, "--regularizer", "kd-adv", "--model", "mlp", "-N", "width=8", "-N", "depth=1")
    size = load("datasets", name).published
    values = math.prod(size.shape)
    assert f"# parameters: {8 * values + 16 + 9 * size.num_classes:,}\n" in text
    n_val = round(size.train / 10)
    assert f"{size.train - n_val:,} to train, {n_val:,} to validate, {size.test:,} to test\n" in text
    assert "# not checked: the data, whose files are not here" in text
    assert requested == []
    assert not list(cache.iterdir())


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_dry_run_reads_the_files_that_are_there(miniature, requested, name):
    made = miniature(name)
    n = len(made.parts[0][0])
    text = planned("--dataset", name, "--data-dir", made.root, "--model", "mlp", "-N", "width=8")
    assert f"# images: {n - n // 10} to train, {n // 10} to validate, 10 to test\n" in text
    assert "not checked" not in text
    (path,) = [path for path in made.root.rglob("*test*") if path.is_file()][:1]
    path.unlink()
    assert "not checked" in planned("--dataset", name, "--data-dir", made.root, "--model", "mlp")
    assert requested == []


@pytest.mark.parametrize("content", [b"", b"junk", b"\x1f\x8b\x08 cut"])
@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_damaged_archive_is_refused(tmp_path, name, content):
    for file in FILES[name].split(" and "):
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: the files in .* damaged"):
        create("datasets", name).load(tmp_path)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_damaged_file_is_refused(miniature, name):
    made = miniature(name)
    path = next(path for path in sorted(made.root.rglob("*")) if path.is_file() and "test" in path.name)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=f"{name}: the files in .* damaged"):
        create("datasets", name).load(made.root)


def smooth(n, height, width, channels=3):
    """Images without detail, which JPEG keeps nearly as they are."""
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    ramp = 60 + 100 * (rows + columns) / 2
    images = [ramp + 4 * number + np.arange(channels)[:, None, None] * 10 for number in range(n)]
    return np.stack(images).astype(np.uint8)


def save(path, image, **options):
    """Write an array, (C, H, W) or (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.transpose(1, 2, 0) if image.ndim == 3 else image
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(path, **options)


WNIDS = ["n02124075", "n04067472", "n07749582"]


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The published tree, of three classes; the files of its test part, which has no labels, lie there too."""
    root = tmp_path / "tiny-imagenet-200"
    x, y = smooth(12, 64, 64), np.arange(12) // 4
    for number, image in enumerate(x):
        wnid, name = WNIDS[y[number]], f"{WNIDS[y[number]]}_{number % 4}.JPEG"
        save(root / "train" / wnid / "images" / name, image, quality=95)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{name}\t0\t10\t63\t58\n")
    x_test, y_test = smooth(6, 64, 64)[::-1], np.array([2, 0, 1, 1, 0, 2])
    for number, image in enumerate(x_test):
        save(root / "val" / "images" / f"val_{number}.JPEG", image, quality=95)
        save(root / "test" / "images" / f"test_{number}.JPEG", image)
    order = [3, 0, 5, 1, 4, 2]  # the annotations decide, not the names
    lines = [f"val_{number}.JPEG\t{WNIDS[y_test[number]]}\t0\t32\t44\t62" for number in order]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    return Miniature(root, ((x, y), (x_test[order], y_test[order])))


def assert_close(images, parts):
    (x, y), (x_test, y_test) = parts
    for found, expected in ((images.train, x), (images.test, x_test)):
        assert np.abs(found.numpy().astype(int) - expected).max() <= 4
    assert np.array_equal(images.train_labels, y)
    assert np.array_equal(images.test_labels, y_test)


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet_is_read_in_its_own_layout(tiny_imagenet, above):
    images = create("datasets", "tiny-imagenet").load(tiny_imagenet.root.parent if above else tiny_imagenet.root)
    assert_close(images, tiny_imagenet.parts)
    assert images.num_classes == 3


def test_tiny_imagenets_few_grey_images_become_colour(tiny_imagenet):
    path = tiny_imagenet.root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_1.JPEG"
    grey = smooth(1, 64, 64, channels=1)
    save(path, grey[0], quality=95)
    image = create("datasets", "tiny-imagenet").load(tiny_imagenet.root).train[1]
    assert np.abs(image.numpy().astype(int) - grey[0]).max() <= 4


def test_tiny_imagenet_trains(tiny_imagenet, tmp_path):
    run = train_briefly(tmp_path, dataset="tiny-imagenet", data_dir=tiny_imagenet.root)
    assert len(run.history) == 1


def test_tiny_imagenet_says_what_to_unpack_where(tmp_path):
    for data_dir in (None, tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"tiny-imagenet-200\.zip .*train/WNID/images/.*val_annotations\.txt"):
            create("datasets", "tiny-imagenet").load(data_dir)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_0.JPEG\tn99999999\t0\t0\t9\t9\n", r"val_annotations\.txt, line 1: 'val_0.*names no class"),
        (f"val_0.JPEG\t{WNIDS[0]}\n\nval_1.JPEG {WNIDS[0]}\n", r"val_annotations\.txt, line 3: "),
        ("", r"val_annotations\.txt is empty"),
        (f"val_99.JPEG\t{WNIDS[0]}\t0\t0\t9\t9\n", r"val_99\.JPEG"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(tiny_imagenet, text, words):
    (tiny_imagenet.root / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        create("datasets", "tiny-imagenet").load(tiny_imagenet.root)


@pytest.mark.parametrize("missing", ["train", "val/images", "val/val_annotations.txt"])
def test_a_part_of_tiny_imagenet_that_is_missing_is_named(tiny_imagenet, missing):
    path = tiny_imagenet.root / missing
    path.rename(tiny_imagenet.root / "aside")
    with pytest.raises(DataError, match=f"there is no {path}"):
        create("datasets", "tiny-imagenet").load(tiny_imagenet.root)


@pytest.fixture
def tree(tmp_path):
    """Writes class folders of images; gives the root and what it should be read as."""

    def write(test="test", classes=("cat", "dog"), channels=3, suffix="png", height=9, width=7):
        root, parts = tmp_path / "tree", []
        for part, each in (("train", 8), (test, 3)):
            n = each * len(classes)
            x = np.random.default_rng(n).integers(0, 256, (n, channels, height, width), dtype=np.uint8)
            y = np.arange(n) // each
            for number, image in enumerate(x):
                save(root / part / classes[y[number]] / f"{number:02}.{suffix}", image)
            parts.append((x, y))
        return Miniature(root, parts)

    return write


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "PNG"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_is_read_exactly(tree, test, suffix):
    made = tree(test, ("cat", "dog", "owl"), suffix=suffix)
    images = create("datasets", "folder").load(made.root)
    assert_same(images, made.parts)
    assert images.num_classes == 3


def test_val_beside_test_is_validated_on(tree):
    made = tree("test")
    picture = np.full((3, 9, 7), 9, np.uint8)
    for name in ("a", "b"):
        save(made.root / "val" / "dog" / f"{name}.png", picture)
    images = create("datasets", "folder").load(made.root)
    assert_same(images, made.parts)
    assert np.array_equal(images.val, [picture, picture])
    assert images.val_labels.tolist() == [1, 1]
    with pytest.warns(AtSmoothWarning, match="the data set's own 2 images"):
        assert Data.split(images).train.n == 16


def test_val_without_test_is_the_test_set_and_that_is_said(tree):
    made = tree("val")
    with pytest.warns(AtSmoothWarning, match="val is the test set, since there is no test/"):
        assert_same(create("datasets", "folder").load(made.root), made.parts)


@pytest.mark.parametrize(
    ("train_name", "test_name"), [("Train", "Test"), ("training", "VALID"), ("TRAIN", "validation")]
)
def test_parts_may_have_their_other_names(tree, train_name, test_name):
    made = tree()
    (made.root / "train").rename(made.root / "aside")  # on file systems without upper and lower case
    (made.root / "aside").rename(made.root / train_name)
    (made.root / "test").rename(made.root / "aside")
    (made.root / "aside").rename(made.root / test_name)
    assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_two_folders_for_one_part_are_refused(tree):
    made = tree()
    save(made.root / "training" / "cat" / "0.png", np.zeros((3, 9, 7), np.uint8))
    with pytest.raises(DataError, match=r"holds train/ and training/: leave one of them"):
        create("datasets", "folder").load(made.root)


@pytest.mark.parametrize("flat", [True, False])
def test_a_test_set_may_be_drawn_from_each_class_and_that_is_said(tree, tmp_path, flat):
    made = tree()
    root = made.root / "train" if flat else made.root
    (made.root / "test").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"-D test_fraction=0\.2"):
        create("datasets", "folder").load(root)
    one, again = [], []
    for drawn in (one, again):
        with pytest.warns(AtSmoothWarning, match=r"0\.25 of each class, drawn by a fixed seed, is the test set \(4 im"):
            drawn.append(create("datasets", "folder", {"test_fraction": 0.25}).load(root))
    images = one[0]
    assert torch.equal(images.test, again[0].test)
    assert images.train_labels.tolist() == [0] * 6 + [1] * 6
    assert images.test_labels.tolist() == [0] * 2 + [1] * 2
    (x, y), _ = made.parts
    everything = torch.cat([images.train, images.test]), torch.cat([images.train_labels, images.test_labels])
    found = {image.numpy().tobytes(): int(label) for image, label in zip(*everything, strict=True)}
    assert found == {image.tobytes(): label for image, label in zip(x, y, strict=True)}


def test_a_share_that_cannot_be_drawn_is_refused(tree):
    made = tree()
    with pytest.raises(DataError, match=r"test is the test set: leave -D test_fraction out"):
        create("datasets", "folder", {"test_fraction": 0.2}).load(made.root)
    save(made.root / "train" / "owl" / "0.png", np.zeros((3, 9, 7), np.uint8))
    with pytest.raises(DataError, match=r"class owl has 1 images"):
        create("datasets", "folder", {"test_fraction": 0.2}).load(made.root / "train")


def test_images_may_lie_deeper_and_other_files_are_passed_over(tree):
    made = tree()
    (made.root / "train" / "cat" / "00.png").rename(made.root / "train" / "cat" / "00.tmp")
    (made.root / "train" / "cat" / "00").mkdir()
    (made.root / "train" / "cat" / "00.tmp").rename(made.root / "train" / "cat" / "00" / "a.png")
    (made.root / "train" / "cat" / "notes.txt").write_text("nothing")
    (made.root / "train" / ".hidden").mkdir()
    (made.root / "train" / "README").write_text("nothing")
    assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_what_systems_leave_in_folders_is_no_image(tree):
    made = tree()
    picture = np.zeros((3, 9, 7), np.uint8)
    for place in (".thumbnails/a.png", "deeper/.ipynb_checkpoints/a.png", "__MACOSX/a.png", ".a.png"):
        save(made.root / "train" / "cat" / place, picture)
    (made.root / "train" / "cat" / "._00.png").write_bytes(b"Mac OS X")
    (made.root / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    save(made.root / "__MACOSX" / "train" / "cat" / "a.png", picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_what_is_left_out_is_counted(tree):
    made = tree()
    for name in ("a.heic", "b.HEIC", "c.npy", "Makefile"):
        (made.root / "train" / "cat" / name).write_bytes(b"")
    (made.root / "test" / "dog" / "d.heic").write_bytes(b"")
    (made.root / "test" / "dog" / "broken.png").symlink_to("nowhere.png")
    save(made.root / "train" / "loose.png", np.zeros((3, 9, 7), np.uint8))
    with pytest.warns(AtSmoothWarning) as said:
        assert_same(create("datasets", "folder").load(made.root), made.parts)
    [text] = [str(each.message) for each in said]
    assert "left out: 3 .heic, " in text
    for words in ("1 .npy", "1 without a suffix", "1 images in train/ itself", "1 broken links or no regular files"):
        assert words in text


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "tif", "JPEG", "webp", "gif", "pbm", "pnm"])
def test_every_suffix_of_the_formats_is_taken(tree, suffix):
    made = tree()
    kind = {"jfif": "JPEG", "jpe": "JPEG", "pbm": "PPM", "pnm": "PPM"}.get(suffix)
    Image.new("RGB", (7, 9)).save(made.root / "train" / "cat" / f"more.{suffix}", format=kind)
    assert len(create("datasets", "folder").load(made.root).train) == 17


def test_a_link_to_a_folder_is_followed_and_circles_are_not(tree):
    made = tree()
    cats = made.root / "train" / "cat"
    cats.rename(made.root / "pool")
    cats.mkdir()
    (cats / "elsewhere").symlink_to("../../pool")
    (cats / "up").symlink_to("..")
    (made.root / "pool" / "round").symlink_to("../train/cat")
    with pytest.warns(AtSmoothWarning, match="left out: 2 links to folders that are read anyway"):
        assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_a_class_may_be_a_link(tree):
    made = tree()
    (made.root / "train" / "dog").rename(made.root / "dogs")
    (made.root / "train" / "dog").symlink_to("../dogs")
    assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_classes_in_digits_are_numbered_as_text_and_that_is_said(tree):
    made = tree(classes=("1", "10", "2"))
    with pytest.warns(AtSmoothWarning, match="numbered by their names as text: 10 comes before 2"):
        assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_a_class_that_differs_by_its_case_is_named(tree):
    made = tree()
    (made.root / "test" / "cat").rename(made.root / "test" / "Cat")
    with pytest.raises(DataError, match=r"have not: Cat\. Did you mean cat\?"):
        create("datasets", "folder").load(made.root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_as_a_viewer_shows_them(tree, suffix, orientation):
    made = tree()
    shown = smooth(1, 9, 7)[0].transpose(1, 2, 0)
    upside_down = np.rot90(shown, 2)
    stored = {  # as a camera stores a picture that is to be shown so
        1: shown,
        2: np.fliplr(shown),
        3: upside_down,
        4: np.flipud(shown),
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown),
        7: upside_down.swapaxes(0, 1),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (made.root / "train" / "cat" / "00.png").unlink()
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = made.root / "train" / "cat" / f"00.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **lossless)
    found = create("datasets", "folder").load(made.root).train[0].permute(1, 2, 0)
    assert np.abs(found.numpy().astype(int) - shown).max() <= 4


def test_of_several_frames_the_first_is_used_and_that_is_said(tree):
    made = tree()
    first, second = Image.new("RGB", (7, 9), "red"), Image.new("RGB", (7, 9), "blue")
    (made.root / "train" / "cat" / "00.png").unlink()
    first.save(made.root / "train" / "cat" / "00.gif", save_all=True, append_images=[second])
    with pytest.warns(
        AtSmoothWarning, match=r"1 files have several frames or pages, such as .*00\.gif; of each the first"
    ):
        image = create("datasets", "folder").load(made.root).train[0]
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 9\n%%EndComments\nshowpage\n"


def test_no_image_starts_a_program(tree, tmp_path, monkeypatch):
    """EPS is what Pillow hands to Ghostscript, whatever the file's name; here it is one that leaves a trace."""
    program, trace = tmp_path / "bin" / "gs", tmp_path / "trace"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)  # which Pillow looks for once
    made = tree()
    path = made.root / "train" / "cat" / "00.png"
    path.write_bytes(EPS)
    with pytest.raises(OSError, match=r"Truncated|cannot|broken"), Image.open(path) as image:  # as Pillow would have it
        image.load()
    assert trace.exists()
    trace.unlink()
    with pytest.raises(DataError, match=f"{path} is no readable image"):
        create("datasets", "folder").load(made.root)
    assert not trace.exists()


def header_of_png(width, height):
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + content
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))


BOMBS = {
    "png": header_of_png(9000, 9000) + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
    "more.png": header_of_png(2**31 - 1, 2**31 - 1) + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
    "frame.gif": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "ppm": b"P6\n60000 60000\n255\n",
    "bmp": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_huge_images_are_refused_before_they_are_decoded(tree, kind, recwarn):
    made = tree()
    path = made.root / "train" / "cat" / f"00.{kind}"
    path.write_bytes(BOMBS[kind])
    with pytest.raises(DataError, match=rf"{path} is .*larger than 80,000,000 pixels\. Scale it down, or remove it"):
        create("datasets", "folder").load(made.root)
    assert not recwarn.list


def test_a_tiff_that_says_it_is_huge_is_refused(tree):
    made = tree()
    path = made.root / "train" / "cat" / "00.tif"
    Image.new("L", (7, 9)).save(path)
    content = bytearray(path.read_bytes())
    for tag in (256, 257):  # width and height, one long each
        at = content.find(struct.pack("<HH", tag, 4))
        content[at + 8 : at + 12] = struct.pack("<I", 60000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is .*larger than 80,000,000 pixels"):
        create("datasets", "folder").load(made.root)


def test_all_grey_images_have_one_channel(tree):
    made = tree(channels=1)
    assert_same(create("datasets", "folder").load(made.root), made.parts)


def test_a_grey_image_among_colour_becomes_colour(tree):
    made = tree()
    grey = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    save(made.root / "train" / "cat" / "00.png", grey)
    images = create("datasets", "folder").load(made.root)
    assert np.array_equal(images.train[0], np.stack([grey] * 3))
    assert np.array_equal(images.train[1:], made.parts[0][0][1:])


def test_a_folder_trains(tree, tmp_path):
    run = train_briefly(tmp_path, dataset="folder", data_dir=tree().root)
    assert len(run.history) == 1


def with_alpha(alpha):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image[..., 3] = alpha
    return Image.fromarray(image)


def put(made, image):
    """Replace the first training image."""
    path = made.root / "train" / "cat" / "00.png"
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_images_lose_their_alpha(tree, mode):
    made = tree()
    opaque = with_alpha(255).convert(mode)
    put(made, opaque)
    image = create("datasets", "folder").load(made.root).train[0]
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(opaque.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_are_refused(tree, mode):
    made = tree()
    path = put(made, with_alpha(254).convert(mode))
    with pytest.raises(DataError, match=f"{path} is transparent .*-D background=white"):
        create("datasets", "folder").load(made.root)


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#306090", (48, 96, 144))])
def test_transparent_images_may_be_put_on_a_background(tree, background, colour):
    made = tree()
    picture = with_alpha(0)
    picture.putpixel((0, 0), (10, 20, 30, 255))
    put(made, picture)
    image = create("datasets", "folder", {"background": background}).load(made.root).train[0].permute(1, 2, 0)
    assert image[0, 0].tolist() == [10, 20, 30]
    assert (image.flatten(0, 1)[1:] == torch.tensor(colour)).all()


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(OptionError, match=r"dataset folder: background: .*white"):
        create("datasets", "folder", {"background": "pink"})


def test_transparency_in_a_palette_is_seen(tree):
    made = tree()
    path = made.root / "train" / "cat" / "00.png"
    with_alpha(255).convert("RGB").quantize(8).save(path, transparency=0)
    with pytest.raises(DataError, match=f"{path} is transparent"):
        create("datasets", "folder").load(made.root)


def test_16_bit_grey_is_refused(tree):
    made = tree()
    path = put(made, Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000))
    with pytest.raises(DataError, match=f"{path} has more than 8 bits a channel"):
        create("datasets", "folder").load(made.root)


def png_of_16_bit_colour(height, width):
    """Pillow writes none, and reads it as 8 bits."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(6 * width)) for _ in range(height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_is_refused(tree):
    made = tree()
    path = made.root / "train" / "cat" / "00.png"
    path.write_bytes(png_of_16_bit_colour(9, 7))
    with pytest.raises(DataError, match=f"{path} has more than 8 bits a channel"):
        create("datasets", "folder").load(made.root)


def test_images_of_two_sizes_are_refused_unless_a_size_is_asked_for(tree):
    made = tree()
    path = put(made, Image.new("RGB", (12, 20)))
    with pytest.raises(DataError, match=rf"{made.root}.* is 7x9, {path} is 12x20\. .*-D size=PIXELS"):
        create("datasets", "folder").load(made.root)
    assert create("datasets", "folder", {"size": 5}).load(made.root).train.shape == (16, 3, 5, 5)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16), (8, 8), (16, 17)])
def test_a_size_takes_the_middle_square(tree, height, width):
    made = tree(height=height, width=width)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = 255  # a spot in the middle
    put(made, Image.fromarray(picture))
    image = create("datasets", "folder", {"size": 8}).load(made.root).train[0].float()
    assert image.shape == (3, 8, 8)
    for profile in (image.sum((0, 1)), image.sum((0, 2))):
        centre = (profile * torch.arange(8)).sum() / profile.sum()
        assert centre.item() == pytest.approx(3.5, abs=0.51)


def test_a_size_too_small_is_refused():
    with pytest.raises(OptionError, match=r"dataset folder: size: .*greater than or equal to 4"):
        create("datasets", "folder", {"size": 3})


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\n cut", png_of_16_bit_colour(9, 7)[:50]])
def test_an_unreadable_image_is_named(tree, content):
    made = tree()
    path = made.root / "test" / "dog" / "03.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is no readable image"):
        create("datasets", "folder").load(made.root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_folder_without_images_is_named(tree, part):
    made = tree(classes=("cat", "dog", "owl"))
    for path in (made.root / part / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=f"{made.root / part / 'dog'} holds no image"):
        create("datasets", "folder").load(made.root)


def test_a_test_class_that_training_lacks_is_named(tree):
    made = tree()
    (made.root / "test" / "owl").mkdir()
    save(made.root / "test" / "owl" / "0.png", np.zeros((3, 9, 7), np.uint8))
    with pytest.raises(DataError, match=r"test has classes that the training images have not: owl\. Add"):
        create("datasets", "folder").load(made.root)


def test_a_class_may_be_missing_from_the_test_set(tree):
    made = tree()
    (made.root / "test" / "dog").rename(made.root / "aside")
    images = create("datasets", "folder").load(made.root)
    assert (images.num_classes, images.test_labels.tolist()) == (2, [0, 0, 0])


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ([], r"should hold the folders train/ and test/ \(or val/\)"),
        (["train/cat"], r"should hold the folders train/ and test/"),
        (["test/cat"], r"should hold the folders train/ and test/"),
        (["train", "test/cat"], "train holds no class folders"),
        (["train/cat", "val"], "val holds no class folders"),
    ],
    ids=str,
)
def test_a_tree_that_is_none_is_refused(tmp_path, folders, words):
    for folder in folders:
        save(tmp_path / folder / "0.png", np.zeros((3, 9, 7), np.uint8))
    with pytest.raises(DataError, match=words):
        create("datasets", "folder").load(tmp_path)


def test_a_folder_needs_a_place():
    with pytest.raises(DataError, match="needs --data-dir"):
        create("datasets", "folder").load(None)


def test_a_single_class_is_refused(tree):
    with pytest.raises(DataError, match="one class"):
        Data.split(create("datasets", "folder").load(tree(classes=("cat",)).root))
