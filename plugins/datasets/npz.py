"""Arrays of one's own, in a NumPy file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from at_smooth import DataError, Dataset, Images

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Npz(Dataset):
    """One .npz file with the arrays x_train, y_train, x_test and y_test.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3; uint8, or float in [0, 1]. Labels are whole
    numbers from 0.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"model": "preact-resnet-18"}

    file: str | None = Field(default=None, description="the file's name, where --data-dir is a folder that has several")
    num_classes: int | None = Field(default=None, ge=2, description="default: the largest label and one")

    def load(self, data_dir: Path | None) -> Images:
        """Read the file that ``data_dir`` names or holds."""
        path = self._find(data_dir)
        try:
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is one array, no readable .npz file; give one with {', '.join(_ARRAYS)}.")
            with archive:
                missing = [name for name in _ARRAYS if name not in archive]
                if missing:
                    raise DataError(
                        f"{path} lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}. "
                        f"Save it with numpy.savez_compressed(path, x_train=..., y_train=..., x_test=..., y_test=...)."
                    )
                x_train, y_train, x_test, y_test = (archive[name] for name in _ARRAYS)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise DataError(f"{path} is no readable .npz file of plain arrays ({error}).") from None
        train, test = _labels(path, "y_train", y_train), _labels(path, "y_test", y_test)
        largest = max((int(part.max()) for part in (train, test) if len(part)), default=0)
        return Images(
            _images(path, "x_train", x_train), train, _images(path, "x_test", x_test), test,
            self.num_classes or largest + 1,
        )  # fmt: skip

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


def _images(path: Path, name: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "uif" or (array.dtype.kind in "ui" and array.dtype != np.uint8):
        raise DataError(f"{path}: {name} is {array.dtype}; give uint8 (0 to 255), or float in [0, 1].")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4:
        raise DataError(f"{path}: {name} has shape {array.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W).")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(path: Path, name: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "ui" or array.ndim != 1:
        raise DataError(f"{path}: {name} is {array.dtype} of shape {array.shape}; give whole numbers, one an image.")
    return torch.from_numpy(array.astype(np.int64))
