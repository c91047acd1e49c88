"""A set of images, and how training augments them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

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
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for name in ("train", "train_labels", "test", "test_labels"):
            value = torch.as_tensor(getattr(self, name))  # NumPy arrays are welcome
            whole = name.endswith("labels") and not value.is_floating_point()
            object.__setattr__(self, name, value.long() if whole else value)


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
