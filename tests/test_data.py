import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from at_smooth import AtSmoothWarning, Augmentation, Data, DataError, Images, create
from at_smooth.data import as_float


def numbered(n=100, classes=5, test=0):
    """Images that say which they are: example i is filled with i."""
    images = torch.arange(n + test, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    labels = torch.arange(n + test) % classes
    return Images(images[:n], labels[:n], images[n:], labels[n:], classes)


def numbers(part):
    return part.images[:, 0, 0, 0].tolist()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_split_is_9_to_1_in_every_class():
    data = Data.split(numbered(100, 5))
    assert torch.bincount(data.train.labels).tolist() == [18] * 5
    assert torch.bincount(data.val.labels).tolist() == [2] * 5


def test_the_split_keeps_every_example_once_with_its_label():
    data = Data.split(numbered())
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(100))
    for part in (data.train, data.val):
        assert part.labels.tolist() == [number % 5 for number in numbers(part)]


def test_the_split_follows_from_the_seed():
    one, same, other = (Data.split(numbered(), seed=seed) for seed in (1, 1, 2))
    assert numbers(one.val) == numbers(same.val)
    assert numbers(one.val) != numbers(other.val)


def test_the_share_is_a_choice():
    assert Data.split(numbered(), validation=0.25).val.n == 25


def test_few_images_are_split_without_strata():
    data = Data.split(numbered(8, 5))
    assert (data.train.n, data.val.n) == (7, 1)


def test_too_few_images_are_refused():
    two = images(train=torch.rand(2, 1, 4, 4), train_labels=torch.arange(2))
    with pytest.raises(DataError, match="2 images are too few"):
        Data.split(two)


def test_each_epoch_is_every_example_once_in_an_order_of_its_own():
    data = Data.split(numbered(), seed=3)
    orders = [[i for batch in data.train_batches(epoch, 16) for i in batch.indices.tolist()] for epoch in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(90))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_the_order_follows_from_the_seed_and_the_purpose():
    data, other = Data.split(numbered(), seed=3), Data.split(numbered(), seed=3)
    other.seed = 4
    first = [next(iter(passing)).indices.tolist() for passing in (
        data.train_batches(0, 16), other.train_batches(0, 16), data.train_batches(0, 16, "batchnorm")
    )]  # fmt: skip
    assert first[0] != first[1]
    assert first[0] != first[2]


def test_a_batch_holds_the_examples_that_its_indices_name():
    data = Data.split(numbered())
    for batch in data.train_batches(0, 16):
        torch.testing.assert_close(batch.clean, data.train.images[batch.indices].float() / 255)
        assert torch.equal(batch.labels, data.train.labels[batch.indices])


def test_augmentation_follows_from_seed_and_epoch():
    augmentation = Augmentation(crop=1, flip=True, rotation=10)
    images = Images(torch.rand(20, 1, 4, 4, generator=rng()), torch.arange(20) % 2, torch.empty(0), torch.empty(0), 2)
    data = Data.split(images, augmentation=augmentation)
    one, same, other = (torch.cat([batch.clean for batch in data.train_batches(e, 8)]) for e in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one.sort(0).values, other.sort(0).values)


@pytest.mark.parametrize(
    ("n", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (3, [3]), (4, [4])]
)  # fmt: skip
def test_a_single_example_left_over_joins_the_batch_before(n, sizes):
    data = Data.split(numbered(n + 2, 2), validation=2 / (n + 2))
    assert [len(batch.labels) for batch in data.train_batches(0, 4)] == sizes
    assert data.steps_per_epoch(4) == len(sizes)


def test_a_part_gives_all_in_order_and_unpacks():
    data = Data.split(numbered(100, 5, test=10))
    batches = list(data.test.batches(4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    images, labels = data.test
    assert torch.equal(torch.cat([batch.clean for batch in batches]), images.float() / 255)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)


def test_bytes_become_shares_and_floats_pass():
    assert as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert as_float(torch.tensor([0.25], dtype=torch.float64)).dtype == torch.float32


def test_a_crop_is_a_window_of_the_padded_image():
    image = torch.rand(1, 2, 3, 4, generator=rng())
    padded = F.pad(image, (1, 1, 1, 1))[0]
    windows = [padded[:, y : y + 3, x : x + 4] for y, x in product(range(3), range(3))]
    crops = Augmentation(crop=1)(image.expand(200, -1, -1, -1), rng())
    seen = [[torch.equal(crop, window) for window in windows].index(True) for crop in crops]
    assert set(seen) == set(range(9))


def test_a_flip_mirrors_about_half_of_the_images():
    image = torch.rand(1, 2, 3, 4, generator=rng())
    flipped = Augmentation(flip=True)(image.expand(400, -1, -1, -1), rng())
    mirrored = [torch.equal(each, image[0].flip(-1)) for each in flipped]
    assert all(turned or torch.equal(each, image[0]) for each, turned in zip(flipped, mirrored, strict=True))
    assert 150 < sum(mirrored) < 250


def test_nothing_is_augmented_unless_asked():
    images = torch.rand(3, 1, 4, 4)
    assert Augmentation()(images, rng()) is images


def test_a_rotation_by_next_to_nothing_is_the_identity():
    images = torch.rand(5, 3, 6, 9, generator=rng())
    torch.testing.assert_close(Augmentation(rotation=1e-6)(images, rng()), images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(41, 41), (33, 49)])
def test_a_rotation_moves_a_spot_along_its_circle(shape):
    rows, columns = torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in shape), indexing="ij")
    spot = torch.exp(-((rows - 3) ** 2 + (columns - 9) ** 2) / 4)
    turned = Augmentation(rotation=30)(spot.expand(300, 1, -1, -1), rng())[:, 0]
    mass = turned.sum((1, 2))
    row, column = ((turned * axis).sum((1, 2)) / mass for axis in (rows, columns))
    radius, angle = torch.hypot(row, column), torch.atan2(row, column) - math.atan2(3, 9)
    torch.testing.assert_close(radius, torch.full((300,), math.hypot(3, 9)), atol=0.1, rtol=0)
    degrees = angle * 180 / math.pi
    assert -30.5 < degrees.min() < -28
    assert 28 < degrees.max() < 30.5


def test_a_rotation_stays_in_the_images_range():
    turned = Augmentation(rotation=180)(torch.ones(50, 1, 5, 5), rng())
    assert turned.min() >= 0
    assert turned.max() <= 1


def images(**changes):
    given = {
        "train": torch.rand(10, 1, 4, 4),
        "train_labels": torch.arange(10) % 2,
        "test": torch.rand(4, 1, 4, 4),
        "test_labels": torch.arange(4) % 2,
    }
    return Images(**{"num_classes": 2, **given, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": torch.tensor([0, 1, 0, 7, 1, 0, 1, 0, 1, 0])}, "training set: label 7 of example 3 .* 2 cl"),
        ({"train_labels": torch.tensor([0, -1] * 5)}, "training set: label -1 of example 1"),
        ({"test_labels": torch.tensor([0, 1, 2, 0])}, "test set: label 2 of example 2"),
        ({"train_labels": torch.tensor([0, 1, 0.5, 1] * 3)[:10]}, "training set: label 0.5 of example 2 is no whole"),
        (
            {"train_labels": torch.tensor([0, 1, torch.inf] * 4)[:10]},
            "training set: label inf of example 2 is no whole",
        ),
        ({"train_labels": torch.eye(2).repeat(5, 1)}, r"training set: labels have shape \(10, 2\).*labels.argmax\(1\)"),
        ({"train_labels": np.array(["a", "b"] * 5)}, r"train_labels is an array of <U1.*return_inverse=True"),
        ({"train_labels": [[0], [1, 2]]}, "train_labels is no tensor"),
        ({"train_labels": torch.arange(10) % 2 + 1}, "label 2 of example 1 .* 2 classes .*begin at 1: subtract 1"),
        ({"train_labels": torch.zeros(9, dtype=int)}, r"training set: 10 images but labels of shape \(9,\)"),
        ({"train": torch.rand(10, 4, 4)}, r"training set: images have shape \(10, 4, 4\)"),
        ({"train": torch.rand(0, 1, 4, 4), "train_labels": torch.zeros(0, dtype=int)}, "there are no images"),
        ({"train": torch.rand(10, 1, 4, 4) + 1}, r"training set: pixel values run from 1\..* outside \[0, 1\]"),
        ({"train": torch.rand(10, 1, 4, 4) - 1}, r"training set: pixel values run from -"),
        ({"test": torch.full((4, 1, 4, 4), torch.nan)}, "test set: pixel values run from nan"),
        ({"train": torch.full((10, 1, 4, 4), torch.inf)}, "training set: .*inf"),
        (
            {"train": torch.zeros(10, 1, 4, 4, dtype=torch.int32)},
            "images are int32; .* from 0 to 0: store them as uint8",
        ),
        ({"train": np.full((10, 1, 4, 4), 65000, np.uint16)}, "images are uint16; .* from 65000 to .* by 65535"),
        ({"train": torch.zeros(10, 1, 4, 4, dtype=torch.bool)}, "images are bool; .*float32"),
        ({"train": torch.full((10, 1, 4, 4), 1.0000001)}, r"from 1\.0000001 to 1\.0000001, .*images\.clip\(0, 1\)"),
        ({"train": torch.rand(10, 1, 4, 4) * 255}, "Divide by 255, or store uint8"),
        ({"train": torch.rand(10, 1, 4, 4) * 2 - 1}, r"scaled to \[-1, 1\], give \(images \+ 1\) / 2"),
        ({"train": torch.rand(10, 1, 4, 4) * 5 - 2}, "Undo their normalisation"),
        ({"train": torch.rand(10, 1, 4, 4) / 255}, r"no pixel is above 0\.003.* divided by 255 twice"),
        ({"train": torch.arange(160).view(10, 1, 4, 4).to(torch.uint8) % 2}, "all pixels are 0 or 1 of 255"),
        ({"train": torch.rand(10, 4, 5, 3), "channels": 3}, r"\(10, 4, 5, 3\), so 4 channels, where 3 are declared"),
        ({"train": torch.rand(10, 5, 4, 3)}, r"so 5 channels, which is unusual.*permute\(0, 3, 1, 2\).*channels=5\)"),
        ({"train": torch.rand(10, 1, 0, 4)}, "without a single pixel"),
        ({"val": torch.rand(3, 1, 4, 5), "val_labels": torch.arange(3) % 2}, "validation images 1x4x5"),
        ({"val": torch.rand(3, 1, 4, 4), "val_labels": torch.arange(3)}, "validation set: label 2 of example 2"),
        ({"val": torch.rand(3, 1, 4, 4)}, "val and val_labels go together"),
        ({"test": torch.rand(4, 1, 4, 5)}, "training images are 1x4x4, test images 1x4x5"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        Data.split(images(**changes))


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(10)[:, None] % 2,
        torch.arange(10) % 2.0,
        np.arange(10, dtype=">i4") % 2,
        np.arange(10) % 2 == 1,
        [0, 1] * 5,
        np.arange(9, -1, -1)[::-1] % 2,
    ],
    ids=["column", "float", "big-endian", "bool", "list", "reversed"],
)
def test_labels_may_be_whole_numbers_in_any_form(labels):
    found = images(train_labels=labels).train_labels
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1] * 5


def test_images_may_be_big_endian():
    pixels = np.random.default_rng(0).random((10, 1, 4, 4))
    assert np.array_equal(images(train=pixels.astype(">f8")).train, pixels)


def test_unusual_channels_may_be_declared():
    data = Data.split(images(train=torch.rand(10, 5, 4, 4), test=torch.rand(4, 5, 4, 4), channels=5))
    assert data.shape == (5, 4, 4)


def test_a_validation_set_of_its_own_is_taken_as_it_is():
    own = images(val=torch.rand(4, 1, 4, 4), val_labels=torch.arange(4) % 2)
    with pytest.warns(AtSmoothWarning, match="the data set's own 4 images; none of the training set are set aside"):
        data = Data.split(own)
    assert torch.equal(data.train.images, own.train)
    assert torch.equal(data.train.labels, own.train_labels)
    assert torch.equal(data.val.images, own.val)
    assert torch.equal(data.val.labels, own.val_labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 4}, r"no training image is of classes 2, 3 \(2 of the 4 classes\)"),
        ({"test_labels": torch.zeros(4, dtype=int)}, r"no test image is of class 1 \(1 of the 2 classes\)"),
        (
            {"test": torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8)},
            "training images are float32, test .* uint8",
        ),
        ({"test": torch.rand(10, 1, 4, 4, generator=rng())[:4]}, "4 of the 4 test images are also among the training"),
        ({"train": torch.rand(10, 1, 4, 4, generator=rng()) / 16}, r"training set: the brightest pixel is 0\.06"),
        (
            {"test": torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4) // 4},
            "test set: the brightest pixel is 15, where white is 255",
        ),
    ],
)
def test_what_may_not_be_meant_is_said(changes, words):
    given = {"train": torch.rand(10, 1, 4, 4, generator=rng()), **changes}
    with pytest.warns(AtSmoothWarning, match=words):
        Data.split(images(**given))


def test_of_ordinary_images_nothing_is_said(recwarn):
    Data.split(images()).pixel_statistics()
    Data.split(create("datasets", "digits").load(None)).pixel_statistics()
    assert not recwarn.list


def test_what_is_said_points_at_the_users_own_line():
    with pytest.warns(AtSmoothWarning) as said:
        Data.split(images(num_classes=3))
    assert {Path(each.filename).name for each in said} == {"test_data.py"}


def test_a_test_set_may_be_missing():
    data = Data.split(images(test=torch.empty(0, 1, 4, 4), test_labels=torch.empty(0, dtype=int)))
    assert data.test.n == 0


def test_the_fingerprint_follows_from_data_and_split_alone():
    prints = {
        name: data.fingerprint()
        for name, data in {
            "one": Data.split(numbered()),
            "same": Data.split(numbered(test=10), augmentation=Augmentation(flip=True)),
            "seed": Data.split(numbered(), seed=1),
            "share": Data.split(numbered(), validation=0.2),
            "fewer": Data.split(numbered(90)),
            "classes": Data.split(numbered(classes=4)),
        }.items()
    }
    assert prints["one"] == prints["same"]
    assert len(set(prints.values())) == 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixel_statistics_are_those_of_the_training_part(dtype):
    pixels = torch.randint(0, 256, (20, 3, 4, 4), generator=rng(), dtype=torch.uint8)
    train = pixels if dtype == torch.uint8 else pixels / 255
    data = Data.split(images(train=train, train_labels=torch.arange(20) % 2, test=train[:4]))
    mean, std = data.pixel_statistics()
    flat = as_float(data.train.images).numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    assert mean == pytest.approx(flat.mean(1), rel=1e-5)
    assert std == pytest.approx(np.std(flat, axis=1, ddof=1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("levels", [1, 2])  # a channel that never varies, and one that flickers by a grey level
def test_a_channel_that_hardly_varies_is_not_scaled(levels, dtype):
    pixels = torch.randint(0, 256, (20, 3, 4, 4), generator=rng(), dtype=torch.uint8)
    pixels[:, 1] = 100 + torch.randint(0, levels, (20, 4, 4), generator=rng(), dtype=torch.uint8)
    train = pixels if dtype == torch.uint8 else pixels / 255
    data = Data.split(images(train=train, train_labels=torch.arange(20) % 2, test=train[:4, :].flip(2)))
    with pytest.warns(AtSmoothWarning, match="channel 1 of the training images hardly varies"):
        mean, std = data.pixel_statistics()
    assert mean[1] == pytest.approx((100 + (levels - 1) / 2) / 255, abs=2e-4)
    assert std[1] == 1
    assert 0.2 < std[0] < 0.4  # as ever


def test_a_channel_that_varies_by_more_than_a_grey_level_is_scaled():
    pixels = torch.randint(100, 104, (20, 1, 4, 4), generator=rng(), dtype=torch.uint8)
    data = Data.split(images(train=pixels, train_labels=torch.arange(20) % 2, test=pixels[:4].flip(2)))
    assert data.pixel_statistics()[1][0] == pytest.approx(math.sqrt(15 / 12) / 255, rel=0.1)


def test_shape_is_channels_height_width():
    data = Data.split(images(train=torch.rand(10, 3, 4, 5), test=torch.rand(4, 3, 4, 5)))
    assert data.shape == (3, 4, 5)
