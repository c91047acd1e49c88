"""A set of images, and how training augments them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from at_smooth.exceptions import DataError
from at_smooth.interfaces.plugin import Plugin


@dataclass(frozen=True)
class Images:
    """A labelled set of images, in memory.

    Attributes:
        train: Training images, (N, C, H, W), uint8, or float in [0, 1].
        train_labels: (N,) int64.
        test: Test images, likewise.
        test_labels: (M,) int64.
        num_classes: How many classes there are.
        val: Images for validation, likewise; None sets some of the training images aside.
        val_labels: (V,) int64, with ``val``.
        channels: C, where it is none of 1, 3 and 4: others are taken for a mistake unless they are declared.

    NumPy arrays are welcome; what is given is copied. Labels may be a column (N, 1), and whole numbers of any type.

    Raises:
        DataError: An array holds no numbers, or one of ``val`` and ``val_labels`` is missing.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    val: Tensor | None = None
    val_labels: Tensor | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if (self.val is None) != (self.val_labels is None):
            raise DataError("val and val_labels go together: give both or neither.")
        for name in ("train", "train_labels", "test", "test_labels", "val", "val_labels"):
            value = getattr(self, name)
            if value is not None:
                tensor = _tensor(name, value)
                object.__setattr__(self, name, _class_numbers(tensor) if name.endswith("labels") else tensor)


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            numbered = ": give numpy.unique(names, return_inverse=True)[1]" if name.endswith("labels") else ""
            raise DataError(f"{name} is an array of {value.dtype}, not of numbers{numbered}.")
        value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))  # torch takes no other
    try:
        return torch.as_tensor(value).clone()  # whoever made the array may change it afterwards
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is no tensor, nor can it become one ({error}).") from None


def _class_numbers(labels: Tensor) -> Tensor:
    """Labels as int64 (N,) where they are whole numbers in another form; others stay, for the checks to name."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = not labels.is_floating_point() or bool((labels == labels.round()).all() and labels.isfinite().all())
    return labels.long() if whole else labels


@dataclass(frozen=True)
class Size:
    """How large a published data set is, known before it is there.

    Attributes:
        shape: (C, H, W).
        train: Training images, those for validation among them.
        test: Test images.
        num_classes: K.
    """

    shape: tuple[int, int, int]
    train: int
    test: int
    num_classes: int


class Dataset(Plugin):
    """Reads a set of images, and says how training augments them."""

    #: How large it is, where that is known before it is read; forecasts use it.
    published: ClassVar[Size | None] = None

    #: What a recipe on this data set starts from, before the user's own choices.
    recipe: ClassVar[Mapping[str, Any]] = {}
    #: The usual radius of the threat on this data set, by norm.
    radii: ClassVar[Mapping[str, str]] = {"Linf": "8/255", "L2": "128/255"}

    crop: int = Field(default=0, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=False, description="random horizontal flip")
    rotation: float = Field(default=0.0, ge=0, le=180, description="random rotation by up to this many degrees")

    @abstractmethod
    def load(self, data_dir: Path | None) -> Images:
        """Read the images.

        Args:
            data_dir: Where the user says that the files are; None for the data set's own place.

        Raises:
            DataError: Files are missing or hold what they must not; the message says which files go where.
        """

    def available(self, data_dir: Path | None) -> bool:
        """Whether :meth:`load` would read files that are here; a dry run loads only then, and uses no network.

        Override it where ``load`` downloads.

        Args:
            data_dir: As for :meth:`load`.
        """
        return True
