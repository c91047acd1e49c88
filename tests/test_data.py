import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from at_smooth import Augmentation, Data, DataError, Images
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
    with pytest.raises(DataError, match="2 images are too few"):
        Data.split(numbered(2, 2))


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
    return Images(**{**given, **changes}, num_classes=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": torch.tensor([0, 1, 0, 7, 1, 0, 1, 0, 1, 0])}, "training set: label 7 of example 3 .* 2 cl"),
        ({"train_labels": torch.tensor([0, -1] * 5)}, "training set: label -1 of example 1"),
        ({"test_labels": torch.tensor([0, 1, 2, 0])}, "test set: label 2 of example 2"),
        ({"train_labels": torch.zeros(10)}, "training set: labels are torch.float32"),
        ({"train_labels": torch.zeros(9, dtype=int)}, r"training set: 10 images but labels of shape \(9,\)"),
        ({"train_labels": torch.zeros(10, 1, dtype=int)}, r"training set: .*shape \(10, 1\)"),
        ({"train": torch.rand(10, 4, 4)}, r"training set: images have shape \(10, 4, 4\)"),
        ({"train": torch.rand(0, 1, 4, 4), "train_labels": torch.zeros(0, dtype=int)}, "there are no images"),
        ({"train": torch.rand(10, 1, 4, 4) + 1}, r"training set: pixel values run from 1\..* outside \[0, 1\]"),
        ({"train": torch.rand(10, 1, 4, 4) - 1}, r"training set: pixel values run from -"),
        ({"test": torch.full((4, 1, 4, 4), torch.nan)}, "test set: pixel values run from nan"),
        ({"train": torch.full((10, 1, 4, 4), torch.inf)}, "training set: .*inf"),
        ({"train": torch.zeros(10, 1, 4, 4, dtype=torch.int32)}, "training set: images are torch.int32"),
        ({"test": torch.rand(4, 1, 4, 5)}, "training images are 1x4x4, test images 1x4x5"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        Data.split(images(**changes))


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


def test_a_constant_channel_has_a_deviation_to_divide_by():
    data = Data.split(images(train=torch.zeros(10, 1, 4, 4)))
    assert data.pixel_statistics()[1][0] > 0


def test_shape_is_channels_height_width():
    data = Data.split(images(train=torch.rand(10, 3, 4, 5), test=torch.rand(4, 3, 4, 5)))
    assert data.shape == (3, 4, 5)
