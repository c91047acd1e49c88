"""scikit-learn's digits: 1,797 real 8x8 images that come with the library, no download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from at_smooth import Dataset, Images

_TEST = 700  # images


class Digits(Dataset):
    """Handwritten digits, 8x8 grey (UCI, by scikit-learn); small enough to see robust overfitting in a minute.

    The split into a training pool and a test set is always the same. So few, so easy images hold little for a network
    to overfit robustly, so a share of the training pool's labels is made wrong: label noise is what robust overfitting
    feeds on (Dong et al., NeurIPS 2022). Test labels are the true ones. ``-D label_noise=0`` trains on true labels.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        "model": "mlp",
        "attack_options": {"mode": "eval"},
        "epochs": 80,
        "batch_size": 60,
        "test_every": 5,
        "threads": 1,  # so small a network gains nothing from more
    }
    radii: ClassVar[Mapping[str, str]] = {"Linf": "0.1", "L2": "0.5"}

    pool: int = Field(default=600, ge=20, le=1097, description="images to train and validate on")
    label_noise: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="share of the pool's labels, those for validation too, that are made wrong",
    )

    def load(self, data_dir: Path | None) -> Images:
        """Take the images from scikit-learn's package."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
        pool, test = train_test_split(np.arange(len(labels)), test_size=_TEST, stratify=labels, random_state=0)
        if self.pool < len(pool):
            pool, _ = train_test_split(pool, train_size=self.pool, stratify=labels[pool], random_state=0)
        labels = labels.astype(np.int64)
        taught = _with_noise(labels[pool], self.label_noise)
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        return Images(x[pool], torch.from_numpy(taught), x[test], y[test], num_classes=10)


def _with_noise(labels: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """The labels with a share of them moved to another class, the same ones every time."""
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(labels), round(share * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return noisy
