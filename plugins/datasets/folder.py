"""Images of one's own, in class folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from at_smooth import DataError, Dataset, Images, notify
from at_smooth_plugins.datasets.image_files import SUFFIXES, all_grey, counted, hidden, image_files, read_images

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Folder(Dataset):
    """A tree train/CLASS/*.png and test/CLASS/*.png; classes are numbered by name, as text.

    val/ beside test/ is validated on; without test/ it is the test set. With -D test_fraction=0.2 a share of each class
    is the test set, and the tree may be CLASS/*.png alone. Images are of the common formats, of 8 bits a channel, and
    turned as their EXIF data say; grey ones become colour unless all are grey. Transparent ones need a background.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"model": "preact-resnet-18"}

    size: int | None = Field(default=None, ge=4, description="scale and crop to squares of this many pixels a side")
    background: str | None = Field(
        default=None,
        pattern="^(white|black|#[0-9a-fA-F]{6})$",
        description="white, black or #rrggbb, on which transparent images are put",
    )
    test_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="share of each class that is the test set, where there is no test/"
    )

    def load(self, data_dir: Path | None) -> Images:
        """Read the tree at ``data_dir``."""
        if data_dir is None:
            raise DataError("the data set 'folder' needs --data-dir, a folder that holds train/ and test/ (or val/).")
        parts = self._parts(data_dir)
        names = _class_names(parts["train"])
        left_out: Counter[str] = Counter()
        found = {part: _examples(parts[part], names, left_out) for part in ("train", "test", "val") if part in parts}
        if left_out:
            notify(f"{data_dir}: left out: {counted(left_out)}. Files that are read: {', '.join(sorted(SUFFIXES))}")
        if self.test_fraction:
            found["train"], found["test"] = _drawn(found["train"], self.test_fraction, names)
            notify(
                f"{data_dir}: {self.test_fraction:.3g} of each class, drawn by a fixed seed, is the test set "
                f"({len(found['test'].files)} images)"
            )
        files = [file for examples in found.values() for file in examples.files]
        images = read_images(files, 1 if all_grey(files) else 3, self.size, self.background)
        pixels = dict(zip(found, torch.split(images, [len(each.files) for each in found.values()]), strict=True))
        train, test, val = found["train"], found["test"], found.get("val")
        return Images(
            pixels["train"],
            train.labels,
            pixels["test"],
            test.labels,
            len(names),
            pixels.get("val"),
            val.labels if val else None,
        )

    def _parts(self, root: Path) -> dict[str, Path]:
        """The folders of the parts; ``test`` is missing where it is drawn from ``train``."""
        parts = _named_parts(root)
        flat = not parts and self.test_fraction is not None
        if "train" not in parts and not flat:
            to_draw = not parts and _folders(root)
            offer = f" To draw the test set from {root}/CLASS instead: -D test_fraction=0.2." if to_draw else ""
            raise DataError(
                f"{root} should hold the folders train/ and test/ (or val/), each with class folders.{offer}"
            )
        if flat:
            return {"train": root}
        if self.test_fraction is not None:
            if "test" in parts:
                raise DataError(f"{parts['test']} is the test set: leave -D test_fraction out, or move it away.")
        elif "test" not in parts:
            if "val" not in parts:
                raise DataError(
                    f"{root} should hold the folders train/ and test/ (or val/), each with class folders. To draw the "
                    f"test set from {parts['train'].name}/ instead: -D test_fraction=0.2."
                )
            notify(f"{parts['val']} is the test set, since there is no test/")
            parts["test"] = parts.pop("val")
        return parts


class _Examples(NamedTuple):
    files: list[Path]
    labels: Tensor


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if not hidden(path.name) and path.is_dir())
    except OSError as error:
        raise DataError(f"{place} cannot be read as a folder ({error.strerror}).") from None


def _named_parts(root: Path) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for path in _folders(root):
        for part, names in _NAMES.items():
            if path.name.lower() in names:
                if part in parts:
                    raise DataError(f"{root} holds {parts[part].name}/ and {path.name}/: leave one of them.")
                parts[part] = path
    return parts


def _class_names(train: Path) -> list[str]:
    names = sorted(path.name for path in _folders(train))
    if not names:
        raise DataError(f"{train} holds no class folders. Put the images of each class into a folder of its own.")
    if all(name.isdecimal() for name in names):
        for name, after in pairwise(names):
            if int(name) > int(after):
                notify(f"{train}: classes are numbered by their names as text: {name} comes before {after}")
                break
    return names


def _examples(part: Path, names: list[str], left_out: Counter[str]) -> _Examples:
    """The image files of a part in the order of classes and names, and the numbers of their classes."""
    folders = _folders(part)
    if not folders:
        raise DataError(f"{part} holds no class folders. Put the images of each class into a folder of its own.")
    unknown = [path.name for path in folders if path.name not in names]
    if unknown:
        same = [name for name in names if name.lower() in {each.lower() for each in unknown}]
        hint = f" Did you mean {', '.join(same)}? Upper and lower case count." if same else ""
        hint = hint or " Add such images to train on, or take these away."
        raise DataError(f"{part} has classes that the training images have not: {', '.join(unknown)}.{hint}")
    loose = [path for path in part.iterdir() if path.suffix.lower() in SUFFIXES and not hidden(path.name)]
    if loose:
        left_out[f"images in {part.name}/ itself, in no class folder"] += len(loose)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if part / name in folders:
            found = image_files(part / name)
            files += found.files
            labels += [label] * len(found.files)
            left_out.update(found.left_out)
    return _Examples(files, torch.tensor(labels))


def _drawn(examples: _Examples, share: float, names: list[str]) -> tuple[_Examples, _Examples]:
    """Training and test examples: of each class a share, one at least, drawn by a fixed seed."""
    rng = np.random.default_rng(0)
    is_test = torch.zeros(len(examples.labels), dtype=torch.bool)
    for label, name in enumerate(names):
        members = (examples.labels == label).nonzero().flatten()
        n = max(1, round(share * len(members)))
        if n >= len(members):
            raise DataError(
                f"class {name} has {len(members)} images, of which -D test_fraction={share:g} would leave none to "
                f"train on. Add images, or take a smaller share."
            )
        is_test[members[rng.permutation(len(members))[:n]]] = True
    return _chosen(examples, ~is_test), _chosen(examples, is_test)


def _chosen(examples: _Examples, which: Tensor) -> _Examples:
    places = which.nonzero().flatten()
    return _Examples([examples.files[place] for place in places.tolist()], examples.labels[places])
