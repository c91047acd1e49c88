"""Tiny-ImageNet, in the layout in which it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from at_smooth import DataError, Dataset, Images, Size
from at_smooth_plugins.datasets.image_files import hidden, image_files, read_images

_LAYOUT = (
    "Unpack tiny-imagenet-200.zip and give --data-dir the folder tiny-imagenet-200, which holds "
    "train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt."
)


class TinyImageNet(Dataset):
    """Tiny-ImageNet: 200 classes of 64x64 images; its validation set, whose labels are public, is the test set."""

    recipe: ClassVar[Mapping[str, Any]] = {
        "model": "preact-resnet-18",
        "epochs": 100,
        "milestones": [50, 80],
    }

    published: ClassVar[Size | None] = Size((3, 64, 64), 100_000, 10_000, 200)

    crop: int = Field(default=4, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=True, description="random horizontal flip")

    def load(self, data_dir: Path | None) -> Images:
        """Read the tree at ``data_dir``."""
        if data_dir is None:
            raise DataError(f"the data set 'tiny-imagenet' is not downloaded by at-smooth. {_LAYOUT}")
        root = data_dir / "tiny-imagenet-200" if (data_dir / "tiny-imagenet-200").is_dir() else data_dir
        annotations = root / "val" / "val_annotations.txt"
        for path in (root / "train", root / "val" / "images", annotations):
            if not path.exists():
                raise DataError(f"tiny-imagenet: there is no {path}. {_LAYOUT}")
        wnids = sorted(path.name for path in (root / "train").iterdir() if path.is_dir() and not hidden(path.name))
        train = [(file, label) for label, wnid in enumerate(wnids) for file in image_files(root / "train" / wnid).files]
        test = _annotated(annotations, wnids)
        images = read_images([file for file, _ in [*train, *test]], channels=3, size=None)
        labels = torch.tensor([label for _, label in [*train, *test]])
        n = len(train)
        return Images(images[:n], labels[:n], images[n:], labels[n:], len(wnids))

    def available(self, data_dir: Path | None) -> bool:
        """Whether a place was named; what is not there is refused in a dry run, too."""
        return data_dir is not None


def _annotated(annotations: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    number = {wnid: label for label, wnid in enumerate(wnids)}
    examples = []
    text = annotations.read_text(encoding="utf-8", errors="replace")
    for line_number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest or rest[0] not in number:
            raise DataError(f"{annotations}, line {line_number}: '{line}' names no class of train/. {_LAYOUT}")
        if not (annotations.parent / "images" / name).is_file():
            raise DataError(f"{annotations}, line {line_number}: there is no file images/{name}. {_LAYOUT}")
        examples.append((annotations.parent / "images" / name, number[rest[0]]))
    if not examples:
        raise DataError(f"{annotations} is empty. {_LAYOUT}")
    return examples
