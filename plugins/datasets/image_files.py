"""Image files to one uint8 tensor, and reasons where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from at_smooth import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of their names.

    Raises:
        DataError: There is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}). Add images or remove the folder.")
    return files


def read_images(paths: Sequence[Path], channels: int, size: int | None) -> Tensor:
    """Decode images of one size.

    Args:
        paths: At least one.
        channels: 1 for grey, 3 for colour; grey images become colour by repetition.
        size: Scale the shorter side to this and cut the middle square; None takes images as they are.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        DataError: An image is unreadable, of another size, has more than 8 bits a channel, or is transparent.
    """
    with ThreadPoolExecutor() as threads:  # decoding runs outside Python's lock
        arrays = list(threads.map(lambda path: _read(path, channels, size), paths))
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            (height, width), (first_height, first_width) = array.shape[:2], arrays[0].shape[:2]
            raise DataError(
                f"{path} is {width}x{height}, {paths[0]} is {first_width}x{first_height}. "
                f"Bring all to one size with -D size=PIXELS."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def all_grey(paths: Sequence[Path]) -> bool:
    """Whether every image is stored as 8-bit grey; reads headers only."""
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in ("1", "L"):
                    return False
        except (OSError, ValueError):
            return False  # the reader will say what is wrong with it
    return True


def _read(path: Path, channels: int, size: int | None) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as image:
            stored = [image.mode, *(str(tile[3]) for tile in image.tile)]  # Pillow reduces 16-bit colour unasked
            image.load()
            if image.mode.startswith(("I", "F")) or any(";16" in mode for mode in stored):
                raise DataError(f"{path} has more than 8 bits a channel. Convert it to 8 bits.")
            if _transparent(image):
                raise DataError(f"{path} is transparent ({image.mode}). Put it on a background and save it without.")
            plain = image.convert("L" if channels == 1 else "RGB")
            if size is not None:
                plain = _middle_square(plain, size)
            return np.asarray(plain, dtype=np.uint8).reshape(plain.height, plain.width, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image ({error}). Replace or remove it.") from None


def _transparent(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _middle_square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    scaled = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return scaled.crop((left, top, left + size, top + size))
