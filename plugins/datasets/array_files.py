"""Arrays of a NumPy archive, read within what the archive says of their size."""

from __future__ import annotations

import math
import zipfile
from typing import Any

import numpy as np

_MOST_PACKED = 1032  # bytes that one byte of a deflated file can stand for


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """One array of an ``.npz`` file. No memory is taken before its header and the archive agree on its size.

    Args:
        archive: The file, opened.
        name: The array's, without ``.npy``.

    Raises:
        ValueError: They do not agree, or the array holds objects.
        Exception: Whatever a damaged archive leads to.
    """
    entry = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of the format {version}, not 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or file.tell() + size != entry.file_size:
            raise ValueError(f"{name} has a header of shape {shape} and {dtype}, and other bytes than that needs")
    if entry.file_size > entry.compress_size * _MOST_PACKED + _MOST_PACKED:
        raise ValueError(f"{name} cannot be {entry.file_size:,} bytes, packed into {entry.compress_size:,}")
    with archive.open(entry) as file:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
