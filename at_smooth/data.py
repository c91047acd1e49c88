"""Images in memory: checks, the split, and batches augmented on the device.

The order of an epoch, and what augmentation does in it, follow from (seed, epoch) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from at_smooth.data_checks import check
from at_smooth.digest import digest_of
from at_smooth.exceptions import DataError
from at_smooth.interfaces import Batch, Images
from at_smooth.notes import notify
from at_smooth.ranks import Ranks, Share
from at_smooth.runtime import generator

_GREY_LEVEL = 1 / 255

Split = Literal["stratified", "last", "permutation"]


@dataclass(frozen=True)
class Augmentation:
    """What training does to a batch of images, all at once.

    Attributes:
        crop: Zero-pad by this many pixels and cut a window of the old size at a random place.
        flip: Mirror each image left to right with probability one half.
        rotation: Rotate each by an angle drawn from +- this many degrees (bilinear, zeros outside).
    """

    crop: int = 0
    flip: bool = False
    rotation: float = 0.0

    def __call__(self, images: Tensor, rng: torch.Generator, share: Share | None = None) -> Tensor:
        """Augment.

        Args:
            images: (N, C, H, W), float.
            rng: A generator on the CPU, so that every device draws the same.
            share: Which images of a batch these are, where they are not all of it: draws are made for all.

        Returns:
            Images of the same shape.
        """
        share = share or Share(0, len(images), len(images))
        shift = torch.randint(0, 2 * self.crop + 1, (2, share.whole), generator=rng) if self.crop else None
        mirrored = torch.rand(share.whole, generator=rng) < 0.5 if self.flip else None
        turn = torch.rand(share.whole, generator=rng) * 2 - 1 if self.rotation else None
        if shift is not None:
            images = _crop(images, self.crop, share.of(shift.T).T)
        if mirrored is not None:
            images = torch.where(share.of(mirrored).to(images.device)[:, None, None, None], images.flip(-1), images)
        if turn is not None and len(images):
            images = _rotate(images, share.of(turn) * torch.pi * self.rotation / 180)
        return images


def _crop(images: Tensor, padding: int, shift: Tensor) -> Tensor:
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    shift = shift.to(images.device)
    rows = shift[0, :, None, None] + torch.arange(height, device=images.device)[None, :, None]
    columns = shift[1, :, None, None] + torch.arange(width, device=images.device)[None, None, :]
    example = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[example, rows, columns].permute(0, 3, 1, 2)


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = images.shape[-2] / images.shape[-1]  # grid coordinates run from -1 to 1 on both axes
    turn = torch.stack([torch.stack([cos, -sin * ratio, zero], 1), torch.stack([sin / ratio, cos, zero], 1)], 1)
    grid = torch.nn.functional.affine_grid(turn.to(images.device), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)


class Part(NamedTuple):
    """One part of the data, which unpacks into images (uint8, or float in [0, 1]) and labels."""

    images: Tensor
    labels: Tensor

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.labels)

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        return Part(self.images.to(device), self.labels.to(device))

    def batches(self, batch_size: int, ranks: Ranks | None = None) -> Iterator[Batch]:
        """All examples in their order, as float images; of each batch this rank's part, which may be empty."""
        ranks = ranks or Ranks()
        for everyone in torch.split(torch.arange(self.n, device=self.labels.device), batch_size):
            indices = ranks.part(len(everyone)).of(everyone)
            whole = len(everyone) if ranks.count > 1 else None
            yield Batch(as_float(self.images[indices]), self.labels[indices], indices, whole)


def _everything(n: int, number: int) -> Share:
    return Share(0, n, n)


@dataclass
class Data:
    """The three parts of an experiment's data.

    Attributes:
        train: What the weights learn from.
        val: What selects the best epoch.
        test: What is reported; may be empty.
        num_classes: K.
        augmentation: Applied to training batches.
        seed: Decides order and augmentation.
    """

    train: Part
    val: Part
    test: Part
    num_classes: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    @classmethod
    def split(
        cls,
        images: Images,
        *,
        seed: int = 0,
        validation: float = 0.1,
        split: Split = "stratified",
        split_seed: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> Data:
        """Check the images and set a share of the training set aside for validation, unless they bring such a part.

        Args:
            images: What was loaded.
            seed: Decides the split, and later the order.
            validation: Share of the training set, in (0, 1); the paper's is 0.1.
            split: ``"stratified"``, the same share of every class; or as the published code has it: ``"last"``, the
                end of the training set, or ``"permutation"``, the end of a NumPy permutation.
            split_seed: Decides the split in the seed's place.
            augmentation: None for none.

        Raises:
            DataError: Shapes, labels or pixel values are not what they must be, or there are too few images.
        """
        check(images)
        classes = len(torch.unique(images.train_labels))
        if classes < 2:
            raise DataError("training set: all images are of one class, so there is nothing to tell apart.")
        train, test = Part(images.train, images.train_labels), Part(images.test, images.test_labels)
        if images.val is not None and images.val_labels is not None:
            val = Part(images.val, images.val_labels)
            notify(f"validation is on the data set's own {val.n} images; none of the training set are set aside")
        else:
            kept, set_aside = _split(
                images.train_labels.numpy(), validation, split, seed if split_seed is None else split_seed
            )
            if split != "stratified" and len(torch.unique(images.train_labels[kept])) < classes:
                raise DataError(
                    f"the split '{split}' leaves a class without training images. Use --set split=stratified."
                )
            train, val = (Part(train.images[part], train.labels[part]) for part in (kept, set_aside))
        return cls(train, val, test, images.num_classes, augmentation or Augmentation(), seed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Data:
        """The same on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches :meth:`train_batches` gives."""
        return len(_batches_of(torch.empty(self.train.n), batch_size))

    def train_batches(
        self, epoch: int, batch_size: int, purpose: str = "train", sharing: Callable[[int, int], Share] = _everything
    ) -> Iterator[Batch]:
        """One pass over the training set, in random order and augmented.

        Args:
            epoch: Together with the seed it decides all randomness here.
            batch_size: Every batch has this size but the last, which may be smaller; a single example left over
                joins the batch before it, since BatchNorm needs two.
            purpose: Passes of different purposes are independent.
            sharing: From a batch's size and number to what this rank does of it, nothing perhaps; the default is all.
        """
        rng = generator(self.seed, epoch, purpose)
        order = torch.randperm(self.train.n, generator=rng)
        for number, chosen in enumerate(_batches_of(order, batch_size)):
            share = sharing(len(chosen), number)
            indices = share.of(chosen).to(self.train.labels.device)
            images = self.augmentation(as_float(self.train.images[indices]), rng, share)
            whole = share.whole if len(indices) < share.whole else None
            yield Batch(images, self.train.labels[indices], indices, whole)

    def fingerprint(self) -> str:
        """A digest of every image and label of the training and validation parts, and of which is which."""
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            for tensor in (part.images, part.labels):
                digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def test_fingerprint(self) -> str:
        """A digest of every image and label of the test part."""
        return digest_of([self.test.images, self.test.labels])[:16]

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training pixels, by channel, in [0, 1] units.

        A channel that varies by less than one grey level holds no picture. Divided by so small a number, what an
        adversary puts there would outweigh all other channels; so its deviation is given as 1, and it stays as it is.
        """
        channels = self.train.images.transpose(0, 1).flatten(1)
        scale = 255.0 if channels.dtype == torch.uint8 else 1.0
        means = [(row.double().mean() / scale).item() for row in channels]
        deviations = [(row.double().std() / scale).item() for row in channels]
        for channel, deviation in enumerate(deviations):
            if not deviation >= _GREY_LEVEL:  # NaN for a single pixel
                notify(
                    f"channel {channel} of the training images hardly varies (standard deviation {deviation:.2g}, "
                    f"below one grey level): it is not scaled"
                )
                deviations[channel] = 1.0
        return means, deviations


def as_float(images: Tensor) -> Tensor:
    """Images in [0, 1]: uint8 is divided by 255, float passes."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def stratified_subset(labels: Tensor, n: int, seed: int) -> Tensor:
    """The positions of n examples, drawn by seed, the classes in their proportions as far as n allows; in order.

    Args:
        labels: (N,), N at least n.
        n: From 1 up.
        seed: Decides which.
    """
    everything = torch.arange(len(labels))
    return everything if n == len(labels) else _stratified(labels.cpu().numpy(), n, seed)[1]


def held_out(n: int, share: float) -> int:
    """How many of n training images a share for validation is: one at least."""
    return max(1, round(n * share))


def _split(labels: np.ndarray[Any, Any], share: float, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    n_val = held_out(len(labels), share)
    if len(labels) - n_val < 2:
        raise DataError(f"training set: {len(labels)} images are too few to set some aside for validation.")
    if split == "stratified":
        return _stratified(labels, n_val, seed)
    order = np.arange(len(labels)) if split == "last" else np.random.RandomState(seed).permutation(len(labels))
    return torch.from_numpy(order[:-n_val]), torch.from_numpy(order[-n_val:])


def _stratified(labels: np.ndarray[Any, Any], n_val: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    counts = counts[counts > 0]
    # a class with one image, or fewer places than classes, cannot be spread evenly
    even = counts.min() >= 2 and n_val >= len(counts) and len(labels) - n_val >= len(counts)
    kept, val = train_test_split(
        np.arange(len(labels)), test_size=n_val, stratify=labels if even else None, random_state=seed
    )
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(val))


def _batches_of(order: Tensor, batch_size: int) -> list[Tensor]:
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    return batches
