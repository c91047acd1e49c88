import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from at_smooth import Data, DataError, OptionError, create


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
        ({"x_train": np.zeros((40, 6, 6), np.int64)}, "x_train is int64"),
        ({"x_test": np.array(["a"] * 10)}, "x_test is <U1"),
        ({"y_train": np.zeros(40)}, "y_train is float64"),
        ({"y_train": np.zeros((40, 1), int)}, r"y_train is int64 of shape \(40, 1\)"),
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
        ({}, {"x_test": np.zeros((9, 6, 6), np.uint8)}, "test set: 9 images but labels"),
        ({}, {"y_train": np.zeros(40, int), "y_test": np.zeros(10, int)}, "one class"),
    ],
)
def test_npz_values_are_checked_before_training(npz, options, changes, words):
    with pytest.raises(DataError, match=words):
        Data.split(create("datasets", "npz", options).load(npz(**changes)))


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
