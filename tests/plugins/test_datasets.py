import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from at_smooth import AtSmoothWarning, Data, DataError, OptionError, create


def test_digits_are_scikit_learns():
    images = create("datasets", "digits", {"pool": 1097, "label_noise": 0}).load(None)
    assert images.train.shape == (1097, 1, 8, 8)
    assert images.test.shape == (700, 1, 8, 8)
    assert (images.train.dtype, images.num_classes) == (torch.uint8, 10)
    pixels, labels = load_digits(return_X_y=True)
    known = sorted((tuple(row), label) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    ours = [
        (tuple(row), label)
        for part, part_labels in ((images.train, images.train_labels), (images.test, images.test_labels))
        for row, label in zip((part.flatten(1) / (255 / 16)).round().tolist(), part_labels.tolist(), strict=True)
    ]
    assert sorted(ours) == known


def test_a_small_pool_is_part_of_the_whole_and_leaves_the_test_set():
    whole, small = (create("datasets", "digits", {"pool": n, "label_noise": 0}).load(None) for n in (1097, 100))
    assert len(small.train) == 100
    assert torch.equal(small.test, whole.test)
    rest = {tuple(image.flatten().tolist()) for image in whole.train}
    assert all(tuple(image.flatten().tolist()) in rest for image in small.train)
    assert torch.bincount(small.train_labels, minlength=10).min() >= 9


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_label_noise_makes_its_share_of_the_training_labels_wrong(share):
    true, noisy = (create("datasets", "digits", {"pool": 500, "label_noise": s}).load(None) for s in (0, share))
    assert torch.equal(noisy.train, true.train)
    wrong = (noisy.train_labels != true.train_labels).float().mean().item()
    assert wrong == pytest.approx(share, abs=0.005)
    assert 0 <= noisy.train_labels.min() <= noisy.train_labels.max() < 10
    assert torch.equal(noisy.test_labels, true.test_labels)


@pytest.mark.parametrize("pool", [19, 1098])
def test_a_pool_out_of_bounds_is_refused(pool):
    with pytest.raises(OptionError, match="dataset digits: pool: "):
        create("datasets", "digits", {"pool": pool})


def test_npz_gives_its_arrays(npz):
    path = npz()
    images = create("datasets", "npz").load(path)
    arrays = np.load(path)
    assert images.train.shape == (40, 1, 6, 6)
    assert np.array_equal(images.train[:, 0], arrays["x_train"])
    assert np.array_equal(images.test[:, 0], arrays["x_test"])
    assert np.array_equal(images.train_labels, arrays["y_train"])
    assert np.array_equal(images.test_labels, arrays["y_test"])
    assert images.num_classes == 2


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_takes_channels_first_and_last(npz, axes, channels):
    x = np.random.default_rng(0).integers(0, 256, (40, channels, 6, 5), dtype=np.uint8)
    images = create("datasets", "npz").load(npz(x_train=x.transpose(axes), x_test=x[:10].transpose(axes)))
    assert np.array_equal(images.train, x)


def test_npz_takes_floats(npz):
    x = np.random.default_rng(0).random((40, 6, 6))
    images = create("datasets", "npz").load(npz(x_train=x))
    assert images.train.dtype == torch.float32
    assert np.allclose(images.train[:, 0], x)


def test_npz_may_have_more_classes_than_labels(npz):
    assert create("datasets", "npz", {"num_classes": 7}).load(npz()).num_classes == 7


def test_npz_is_found_in_a_folder_and_chosen_where_there_are_several(npz):
    first = npz()
    assert len(create("datasets", "npz").load(first.parent).train) == 40
    second = npz(x_train=np.zeros((12, 6, 6), np.uint8), y_train=np.arange(12) % 2)
    with pytest.raises(DataError, match=f"{first.name}, {second.name}"):
        create("datasets", "npz").load(first.parent)
    assert len(create("datasets", "npz", {"file": second.name}).load(first.parent).train) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "lacks y_test; it holds x_train, y_train, x_test"),
        ({"x_train": np.zeros((40, 6))}, r"x_train has shape \(40, 6\)"),
        ({"x_train": np.zeros((40, 64))}, r"x_train has shape \(40, 64\).*reshape\(-1, 8, 8\)"),
        ({"x_train": np.zeros((6, 6, 40))}, r"so 6 images, but there are 40 labels.*x_train\.transpose\(2, 0, 1\)"),
        ({"x_train": np.zeros((6, 6, 3, 40))}, r"x_train\.transpose\(3, 2, 0, 1\)"),
        ({"x_test": np.zeros((9, 6, 6), np.uint8)}, r"x_test has shape \(9, 6, 6\), so 9 images, .* 10 labels"),
        ({"x_train": np.zeros((40, 3, 6, 3))}, "channels may be first or last.*-D layout=nchw or -D layout=nhwc"),
        ({"x_train": np.zeros((40, 4, 6, 4))}, "channels may be first or last"),
        ({"x_train": np.zeros((40, 7, 6, 5))}, "-D layout=nhwc -D channels=5, or -D layout=nchw -D channels=7"),
        ({"x_train": np.zeros((40, 6, 6, 4))}, r"no opaque alpha channel \(all 1\).*-D channels=4"),
        ({"x_train": np.zeros((40, 2, 6, 6), np.uint8)}, r"no opaque alpha channel \(all 255\).*-D channels=2"),
        ({"x_test": np.array(["a"] * 10)}, "x_test is <U1"),
        ({"y_train": np.array(["a", "b"] * 20)}, r"y_train is an array of <U1.*numpy.unique\(y_train, "),
        ({"y_train": np.array(0)}, "y_train int64; give images and their labels"),
        ({"y_train": np.arange(40) % 10 + 1}, r"labels run from 1 to 10, .* label 0\..*labels - 1.*num_classes=11"),
        ({"y_train": np.arange(40) % 2 * 3}, r"labels run from 0 to 3, .* label 1, 2\..*return_inverse.*num_classes=4"),
        (
            {"y_train": np.arange(40) % 2 * 10**12},
            r"no training image has label 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\.",
        ),
        ({"x_val": np.zeros((4, 6, 6), np.uint8)}, "holds x_val, but of x_val and y_val both are needed"),
        ({"x_train": np.array([{}] * 40)}, "no readable .npz"),
    ],
)
def test_npz_refuses_arrays_that_are_no_labelled_images(npz, changes, words):
    path = npz(**changes)
    with pytest.raises(DataError, match=words) as caught:
        create("datasets", "npz").load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {"y_train": np.arange(40) % 2 - 1}, "training set: label -1 of example 0"),
        ({"num_classes": 2}, {"y_test": np.arange(10) % 3}, "test set: label 2 of example 2 .* 2 classes"),
        ({}, {"x_train": np.full((40, 6, 6), 255.0)}, "training set: pixel values .* outside"),
        ({}, {"x_train": np.zeros((40, 6, 6), np.int64)}, "training set: images are int64"),
        ({}, {"y_train": np.arange(40) % 2 / 2}, "training set: label 0.5 of example 1"),
        ({}, {"y_train": np.eye(2)[np.arange(40) % 2]}, r"training set: labels have shape \(40, 2\)"),
        ({}, {"y_test": np.arange(10) % 3}, "test set: label 2 of example 2 .* 2 classes"),
        ({"layout": "nchw", "channels": 6}, {"x_train": np.ones((40, 6, 6, 3))}, "test set: images .* so 1 channels"),
        ({}, {"y_train": np.zeros(40, int), "y_test": np.zeros(10, int)}, "one class"),
    ],
)
def test_npz_values_are_checked_before_training(npz, options, changes, words):
    with pytest.raises(DataError, match=words):
        Data.split(create("datasets", "npz", options).load(npz(**changes)))


STATED = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "x", "expected"),
    [
        ({"layout": "nchw"}, STATED, STATED),
        ({"layout": "nhwc"}, STATED, STATED.transpose(0, 3, 1, 2)),
        ({"channels": 6}, STATED.transpose(0, 2, 1, 3), STATED.transpose(0, 2, 1, 3)),
        ({"channels": 6, "layout": "nhwc"}, STATED.repeat(2, 3), STATED.repeat(2, 3).transpose(0, 3, 1, 2)),
    ],
)
def test_npz_takes_what_is_stated(npz, options, x, expected):
    images = create("datasets", "npz", options).load(npz(x_train=x, x_test=x[:10]))
    assert np.array_equal(images.train, expected)
    assert Data.split(images).shape == expected.shape[1:]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("axis", [1, -1])
def test_npz_leaves_out_an_opaque_alpha_channel_and_says_so(npz, channels, dtype, axis):
    x = np.random.default_rng(0).integers(0, 256, (40, channels, 6, 7), dtype=np.uint8)
    x, white = (x, 255) if dtype == np.uint8 else (x.astype(dtype) / 255, 1)
    with_alpha = np.concatenate([x, np.full_like(x[:, :1], white)], 1)
    stored = np.moveaxis(with_alpha, 1, axis)
    with pytest.warns(AtSmoothWarning, match=f"x_train: the last of {channels + 1} channels is an opaque alpha"):
        images = create("datasets", "npz").load(npz(x_train=stored, x_test=x[:10]))
    assert np.array_equal(images.train, x)


def test_npz_says_that_layouts_differ(npz):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 5), dtype=np.uint8)
    with pytest.warns(AtSmoothWarning, match="layouts differ: x_train is nhwc, x_test is nchw"):
        images = create("datasets", "npz").load(npz(x_train=x.transpose(0, 2, 3, 1), x_test=x[:10]))
    assert np.array_equal(images.train, x)
    assert np.array_equal(images.test, x[:10])


@pytest.mark.parametrize("names", ["x_{}", "{}_images"])
def test_npz_validates_on_its_own_validation_images(tmp_path, names):
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 20), ("val", 6), ("test", 8)):
        arrays[names.format(part)] = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        labels = "y_{}" if names == "x_{}" else "{}_labels"
        arrays[labels.format(part)] = np.arange(n)[:, None] % 2  # MedMNIST's are columns
    np.savez(tmp_path / "own.npz", **arrays)
    images = create("datasets", "npz").load(tmp_path / "own.npz")
    for found, part in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert np.array_equal(found[:, 0], arrays[names.format(part)])
    assert images.val_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.num_classes == 2


def test_npz_says_what_it_leaves_out(npz):
    with pytest.warns(AtSmoothWarning, match="arrays of other names are left out: weights"):
        create("datasets", "npz").load(npz(weights=np.zeros(3)))
    with pytest.warns(AtSmoothWarning, match="has no test images"):
        create("datasets", "npz").load(npz(x_test=np.zeros((0, 6, 6), np.uint8), y_test=np.zeros(0, int)))


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no readable \.npz"):
        create("datasets", "npz").load(path)


def test_an_npy_file_is_refused(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match=r"no readable \.npz"):
        create("datasets", "npz").load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="needs --data-dir"):
        create("datasets", "npz").load(None)
    with pytest.raises(DataError, match=r"nothing at .*missing\.npz"):
        create("datasets", "npz").load(tmp_path / "missing.npz")
    with pytest.raises(DataError, match=r"holds no \.npz file"):
        create("datasets", "npz").load(tmp_path)
    with pytest.raises(DataError, match=r"there is no file .*other\.npz"):
        create("datasets", "npz", {"file": "other.npz"}).load(tmp_path)
