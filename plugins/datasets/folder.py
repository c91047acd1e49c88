"""Images of one's own, in class folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from at_smooth import DataError, Dataset, Images
from at_smooth_plugins.datasets.image_files import all_grey, image_files, read_images


class Folder(Dataset):
    """A tree train/CLASS/*.png and test/CLASS/*.png (or val/ for test/); classes are numbered by name.

    8-bit images of any common format; grey ones become colour unless all are grey. Transparent ones and those of more
    than 8 bits are refused.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"model": "preact-resnet-18"}

    size: int | None = Field(default=None, ge=4, description="scale and crop to squares of this many pixels a side")

    def load(self, data_dir: Path | None) -> Images:
        """Read the tree at ``data_dir``."""
        train_dir, test_dir = self._parts(data_dir)
        classes = _class_folders(train_dir)
        names = [folder.name for folder in classes]
        strangers = [folder.name for folder in _class_folders(test_dir) if folder.name not in names]
        if strangers:
            raise DataError(f"{test_dir} has classes that {train_dir} has not: {', '.join(strangers)}.")
        train, train_labels = _examples(train_dir, names)
        test, test_labels = _examples(test_dir, names)
        channels = 1 if all_grey([*train, *test]) else 3
        images = read_images([*train, *test], channels, self.size)
        return Images(images[: len(train)], train_labels, images[len(train) :], test_labels, len(names))

    def _parts(self, data_dir: Path | None) -> tuple[Path, Path]:
        if data_dir is None:
            raise DataError("the data set 'folder' needs --data-dir, a folder that holds train/ and test/ (or val/).")
        candidates = [data_dir / name for name in ("test", "val")]
        tests = [path for path in candidates if path.is_dir()]
        if not (data_dir / "train").is_dir() or not tests:
            raise DataError(f"{data_dir} should hold the folders train/ and test/ (or val/), each with class folders.")
        return data_dir / "train", tests[0]


def _class_folders(part: Path) -> list[Path]:
    folders = sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{part} holds no class folders. Put the images of each class into a folder of its own.")
    return folders


def _examples(part: Path, names: list[str]) -> tuple[list[Path], Tensor]:
    files, labels = [], []
    for label, name in enumerate(names):
        if (part / name).is_dir():
            found = image_files(part / name)
            files += found
            labels += [label] * len(found)
    return files, torch.tensor(labels)
