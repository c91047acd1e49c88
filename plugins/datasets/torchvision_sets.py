"""CIFAR-10, CIFAR-100, SVHN and STL-10, read and downloaded by torchvision."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from at_smooth import DataError, Dataset, Images, Size, cache_directory

_FAILURES = (
    *(OSError, RuntimeError, EOFError, KeyError, ValueError, ImportError),
    *(pickle.UnpicklingError, tarfile.TarError, zipfile.BadZipFile),
)


def _root(data_dir: Path | None) -> Path:
    return data_dir or cache_directory() / "data"


class _TorchvisionSet(Dataset):
    """What the four have in common: torchvision checks, downloads and decodes the files."""

    _NAME: ClassVar[str]
    _FILES: ClassVar[str]
    _NUM_CLASSES: ClassVar[int] = 10

    recipe: ClassVar[Mapping[str, Any]] = {"model": "preact-resnet-18"}

    def load(self, data_dir: Path | None) -> Images:
        """Read the files at ``data_dir``, or in the user's cache directory; download them where they are not there."""
        root = _root(data_dir)
        try:
            (x_train, y_train), (x_test, y_test) = self._parts(root, download=True)
        except _FAILURES as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self._NAME}: the files in {root} are missing or damaged, and could not be downloaded ({reason}). "
                f"Put {self._FILES} into {root}, or say where they are with --data-dir."
            ) from None
        return Images(x_train, y_train, x_test, y_test, self._NUM_CLASSES)

    def available(self, data_dir: Path | None) -> bool:
        """Whether torchvision reads the files, unpacked, without downloading any."""
        try:
            self._parts(_root(data_dir), download=False)
        except _FAILURES:
            return False
        return True

    def _parts(self, root: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
        return [self._part(root, train, download) for train in (True, False)]

    @abstractmethod
    def _part(self, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) uint8 and labels (N,) of one part."""


class CIFAR10(_TorchvisionSet):
    """CIFAR-10: 60,000 colour images of 32x32 in 10 classes."""

    published: ClassVar[Size | None] = Size((3, 32, 32), 50_000, 10_000, 10)
    _NAME: ClassVar[str] = "cifar10"
    _FILES: ClassVar[str] = "cifar-10-python.tar.gz"

    crop: int = Field(default=4, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=True, description="random horizontal flip")

    def _part(self, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR10

        return _height_width_channels(CIFAR10(root, train, download=download))


class CIFAR100(_TorchvisionSet):
    """CIFAR-100: 60,000 colour images of 32x32 in 100 classes; rotated in training, as in the published code."""

    published: ClassVar[Size | None] = Size((3, 32, 32), 50_000, 10_000, 100)
    _NAME: ClassVar[str] = "cifar100"
    _FILES: ClassVar[str] = "cifar-100-python.tar.gz"
    _NUM_CLASSES: ClassVar[int] = 100

    crop: int = Field(default=4, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=True, description="random horizontal flip")
    rotation: float = Field(default=15.0, ge=0, le=180, description="random rotation by up to this many degrees")

    def _part(self, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR100

        return _height_width_channels(CIFAR100(root, train, download=download))


class SVHN(_TorchvisionSet):
    """SVHN: 99,289 house numbers of 32x32 in 10 classes; trained as in A1.3 (80 epochs, lr 0.01, cosine).

    No flip: mirrored digits are none. The paper does not say how it augments.
    """

    published: ClassVar[Size | None] = Size((3, 32, 32), 73_257, 26_032, 10)
    _NAME: ClassVar[str] = "svhn"
    _FILES: ClassVar[str] = "train_32x32.mat and test_32x32.mat"

    recipe: ClassVar[Mapping[str, Any]] = {
        "model": "preact-resnet-18",
        "epochs": 80,
        "lr": 0.01,
        "lr_schedule": "cosine",
    }

    crop: int = Field(default=4, ge=0, description="random crop after zero-padding by this many pixels on each side")

    def _part(self, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import SVHN

        return _channels_height_width(SVHN(root, "train" if train else "test", download=download))


class STL10(_TorchvisionSet):
    """STL-10: 5,000 training and 8,000 test images of 96x96 in 10 classes; the unlabelled ones are not used.

    The crop is as wide for these images as 4 pixels are for CIFAR's; the paper does not say how it augments.
    """

    published: ClassVar[Size | None] = Size((3, 96, 96), 5_000, 8_000, 10)
    _NAME: ClassVar[str] = "stl10"
    _FILES: ClassVar[str] = "stl10_binary.tar.gz"

    crop: int = Field(default=12, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=True, description="random horizontal flip")

    def _part(self, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import STL10

        class Labelled(STL10):  # type: ignore[misc]  # torchvision is untyped
            """Without the 2.6 GB of unlabelled images, which torchvision would check each time."""

            train_list: ClassVar[list[list[str]]] = STL10.train_list[:2]

        return _channels_height_width(Labelled(root, "train" if train else "test", download=download))


def _height_width_channels(dataset: Any) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.asarray(dataset.data, dtype=np.uint8)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, dtype=torch.int64)


def _channels_height_width(dataset: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.asarray(dataset.data)), torch.from_numpy(np.asarray(dataset.labels, dtype=np.int64))
