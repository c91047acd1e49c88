"""Arrays of one's own, in a NumPy file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from at_smooth import DataError, Dataset, Images, notify
from at_smooth_plugins.datasets.array_files import read_array
from at_smooth_plugins.datasets.array_layout import Array, Layout, Stated, channels_first

#: Names of the arrays: for training, for testing, and for validation if there are such.
_NAMES = (
    ("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"),
    ("train_images", "train_labels", "test_images", "test_labels", "val_images", "val_labels"),  # MedMNIST
)
_REQUIRED = 4
_MOST_NAMED = 10  # labels in a message


class Npz(Dataset):
    """One .npz file with the arrays x_train, y_train, x_test and y_test, or with MedMNIST's names.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3; uint8, or float in [0, 1]. Labels are whole
    numbers from 0. Arrays x_val and y_val are validated on; without them some of the training images are.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"model": "preact-resnet-18"}

    file: str | None = Field(default=None, description="the file's name, where --data-dir is a folder that has several")
    num_classes: int | None = Field(
        default=None, ge=2, description="default: the largest training label and one, where no class is without images"
    )
    layout: Layout | None = Field(default=None, description="nchw or nhwc, where the shapes leave it open")
    channels: int | None = Field(
        default=None, ge=1, description="how many channels the images have, where it is not 1 or 3"
    )

    def load(self, data_dir: Path | None) -> Images:
        """Read the file that ``data_dir`` names or holds."""
        path = self._find(data_dir)
        arrays = _read(path)
        parts: list[Any] = []
        layouts = {}
        for (x_name, x), (y_name, y) in zip(arrays[::2], arrays[1::2], strict=True):
            if y.dtype.kind in "USO":
                raise DataError(
                    f"{path}: {y_name} is an array of {y.dtype}, not of numbers: give "
                    f"numpy.unique({y_name}, return_inverse=True)[1]."
                )
            if x.dtype.kind not in "biuf" or y.ndim == 0:
                raise DataError(f"{path}: {x_name} is {x.dtype}, {y_name} {y.dtype}; give images and their labels.")
            with _naming(path):
                x, layouts[x_name] = channels_first(x_name, x, len(y), Stated(self.layout, self.channels))
            parts += [x.astype(np.float32) if x.dtype.kind == "f" else x, y]
        if {"nchw", "nhwc"} <= set(layouts.values()):
            notify(f"{path}: layouts differ: {', '.join(f'{name} is {layout}' for name, layout in layouts.items())}")
        if len(parts[3]) == 0:
            notify(f"{path} has no test images, so nothing is measured on a test set")
        with _naming(path):
            x, y, x_test, y_test, x_val, y_val = (*parts, None, None)[:6]
            images = Images(x, y, x_test, y_test, self.num_classes or 0, x_val, y_val, self.channels)
        return images if self.num_classes else replace(images, num_classes=_count(path, images.train_labels))

    def _find(self, data_dir: Path | None) -> Path:
        if data_dir is None:
            raise DataError("the data set 'npz' needs --data-dir, the path of a .npz file or of a folder with one.")
        if not data_dir.exists():
            raise DataError(f"there is nothing at {data_dir}. Give --data-dir the path of a .npz file.")
        if data_dir.is_file():
            return data_dir
        files = [data_dir / self.file] if self.file else sorted(data_dir.glob("*.npz"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "no .npz file"
            raise DataError(f"{data_dir} holds {found}. Choose one with --data-dir {data_dir}/NAME.npz.")
        if not files[0].is_file():
            raise DataError(f"there is no file {files[0]}.")
        return files[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin the message of an error with the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read(path: Path) -> list[tuple[str, Array]]:
    """The arrays by name: training images, their labels, the same for testing and, where there are such, validation."""
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)  # the mode is for a bare array, however large
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is one array, no readable .npz file; give one with {', '.join(_NAMES[0][:4])}.")
        with archive:
            names = max(_NAMES, key=lambda known: sum(name in archive.files for name in known[:_REQUIRED]))
            missing = [name for name in names[:_REQUIRED] if name not in archive.files]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}. "
                    f"Save it with numpy.savez_compressed(path, x_train=..., y_train=..., x_test=..., y_test=...)."
                )
            held = [name for name in names[_REQUIRED:] if name in archive.files]
            if len(held) == 1:
                raise DataError(f"{path} holds {held[0]}, but of {' and '.join(names[_REQUIRED:])} both are needed.")
            wanted = [*names[:_REQUIRED], *held]
            left = [name for name in archive.files if name not in wanted]
            if left:
                notify(f"{path}: arrays of other names are left out: {', '.join(left)}")
        with zipfile.ZipFile(path) as packed:
            return [(name, read_array(packed, name)) for name in wanted]
    except DataError:
        raise
    except Exception as error:  # a damaged archive breaks the reader in any way it likes
        raise DataError(f"{path} is no readable .npz file of plain arrays ({error}).") from None


def _count(path: Path, labels: Tensor) -> int:
    """How many classes the training labels make; labels that are none are left to the checks of the core."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0:
        return 2
    present: set[int] = set(torch.unique(labels).tolist())
    lowest, largest = min(present), max(present)
    if lowest >= 0 and len(present) <= largest:
        absent = list(islice((number for number in range(largest) if number not in present), _MOST_NAMED + 1))
        shown = ", ".join(map(str, absent[:_MOST_NAMED])) + ", ..." * (len(absent) > _MOST_NAMED)
        mend = "labels - 1" if absent == [0] else "numpy.unique(labels, return_inverse=True)[1]"
        raise DataError(
            f"{path}: training labels run from {lowest} to {largest}, but no training image has label {shown}. Number "
            f"the classes from 0 without gaps ({mend}), or say that they are meant: -D num_classes={largest + 1}."
        )
    return max(2, largest + 1)
