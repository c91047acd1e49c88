"""scikit-learn's digits: 1,797 real 8x8 images that come with the library, no download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from at_smooth import Dataset, Images


class Digits(Dataset):
    """Handwritten digits, 8x8 grey (UCI, by scikit-learn); small enough to see robust overfitting in a minute.

    The split into a training pool and a test set is always the same; a small pool is what makes AT overfit.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        "model": "mlp",
        "epochs": 100,
        "batch_size": 48,
        "test_every": 5,
        "threads": 1,  # so small a network gains nothing from more
    }
    radii: ClassVar[Mapping[str, str]] = {"Linf": "0.15", "L2": "0.75"}

    pool: int = Field(default=480, ge=20, le=1097, description="images to train and validate on")

    _TEST = 700

    def load(self, data_dir: Path | None) -> Images:
        """Take the images from scikit-learn's package."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
        rest, test = train_test_split(np.arange(len(labels)), test_size=self._TEST, stratify=labels, random_state=0)
        pool = rest
        if self.pool < len(rest):
            pool, _ = train_test_split(rest, train_size=self.pool, stratify=labels[rest], random_state=0)
        x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        return Images(x[pool], y[pool], x[test], y[test], num_classes=10)
