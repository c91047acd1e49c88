"""Image files to one uint8 tensor, and reasons where that cannot be."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from at_smooth import DataError, notify

#: What Pillow may decode. It goes by a file's content, and others of its decoders start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")

#: Names that files of these formats have.
SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .bmp .gif .webp .ppm .pgm .pbm .pnm .tif .tiff".split()  # noqa: SIM905
)

_MOST_PIXELS = 80_000_000  # of one image; any camera's picture, and below the size at which Pillow warns
_NOT_IMAGES = ("__macosx", "thumbs.db", "desktop.ini")  # that systems leave in folders


class Found(NamedTuple):
    """The image files below a folder, in the order of their names, and the others: how many of which kind."""

    files: list[Path]
    left_out: Counter[str]


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: it begins with a dot, or a system put it there."""
    return name.startswith(".") or name.lower() in _NOT_IMAGES


def image_files(folder: Path) -> Found:
    """Look for image files below a folder; links to folders are followed, what is hidden is not looked at.

    Raises:
        DataError: There is none, or a folder cannot be read.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    seen = {_identity(path) for path in (folder, *folder.resolve().parents)}  # a link back to one leads in circles
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        below = []
        for name in sorted(name for name in folders if not hidden(name)):
            identity = _identity(Path(place, name))
            if identity in seen:
                left_out["links to folders that are read anyway"] += 1
            else:
                seen.add(identity)
                below.append(name)
        folders[:] = below
        for path in (Path(place, name) for name in names if not hidden(name)):
            if path.suffix.lower() not in SUFFIXES:
                left_out[path.suffix.lower() or "without a suffix"] += 1
            elif path.is_file():
                files.append(path)
            else:
                left_out["broken links or no regular files"] += 1
    if not files:
        others = f"; it holds {counted(left_out)}" if left_out else ""
        raise DataError(
            f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}){others}. Add images, converted if need be, or "
            f"remove the folder."
        )
    return Found(sorted(files), left_out)


def counted(left_out: Counter[str]) -> str:
    """How many files of which kind, in words."""
    return ", ".join(f"{n} {kind}" for kind, n in left_out.most_common())


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"the folder {error.filename} cannot be read ({error.strerror}).")


def read_images(paths: Sequence[Path], channels: int, size: int | None, background: str | None = None) -> Tensor:
    """Decode images of one size, turned as a viewer shows them.

    Args:
        paths: At least one.
        channels: 1 for grey, 3 for colour; grey images become colour by repetition.
        size: Scale the shorter side to this and cut the middle square; None takes images as they are.
        background: A colour's name or #rrggbb, on which transparent images are put; None refuses them.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        DataError: An image is unreadable, of another size, too large, has more than 8 bits a channel, or is
            transparent.
    """
    with _without_warnings(), ThreadPoolExecutor() as threads:  # decoding runs outside Python's lock
        images = list(threads.map(lambda path: _read(path, channels, size, background), paths))
    arrays = [image.pixels for image in images]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            (height, width), (first_height, first_width) = array.shape[:2], arrays[0].shape[:2]
            raise DataError(
                f"{path} is {width}x{height}, {paths[0]} is {first_width}x{first_height}. "
                f"Bring all to one size with -D size=PIXELS."
            )
    several = [path for path, image in zip(paths, images, strict=True) if image.frames]
    if several:
        notify(f"{len(several)} files have several frames or pages, such as {several[0]}; of each the first is used")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def all_grey(paths: Sequence[Path]) -> bool:
    """Whether every image is stored as 8-bit grey; reads headers only."""
    with _without_warnings():
        for path in paths:
            with _opened(path) as image:
                if image.mode not in ("1", "L"):
                    return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image, its header read and its pixels not yet; what fails meanwhile is an error that names the file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _bound(path, image)
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Exception as error:  # a decoder that meets a broken file raises anything
        raise DataError(
            f"{path} is no readable image ({error or type(error).__name__}). Replace or remove it."
        ) from None


def _bound(path: Path, image: Image.Image) -> None:
    if image.width * image.height > _MOST_PIXELS:
        raise _too_large(path, f"is {image.width}x{image.height}, ")


def _too_large(path: Path, what: str = "is ") -> DataError:
    return DataError(f"{path} {what}larger than {_MOST_PIXELS:,} pixels. Scale it down, or remove it.")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without Pillow's words on broken metadata, and on sizes that are refused anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class _Decoded(NamedTuple):
    pixels: np.ndarray[Any, Any]  # (H, W, C) uint8
    frames: bool  # whether there are more, which are not read


def _read(path: Path, channels: int, size: int | None, background: str | None) -> _Decoded:
    with _opened(path) as image:
        frames = image.format != "MPO" and getattr(image, "is_animated", False)  # phones put previews into MPO
        stored = [image.mode, *(str(tile[3]) for tile in image.tile)]  # Pillow reduces 16-bit colour unasked
        image.load()
        _bound(path, image)  # a GIF's first frame may be larger than its header says
        if image.mode.startswith(("I", "F")) or any(";16" in mode for mode in stored):
            raise DataError(f"{path} has more than 8 bits a channel. Convert it to 8 bits.")
        shown = ImageOps.exif_transpose(image)
        if _transparent(shown):
            shown = _on_background(path, shown, background)
        plain = shown.convert("L" if channels == 1 else "RGB")
        if size is not None:
            plain = _middle_square(plain, size)
        return _Decoded(np.asarray(plain, dtype=np.uint8).reshape(plain.height, plain.width, channels), frames)


def _transparent(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _on_background(path: Path, image: Image.Image, colour: str | None) -> Image.Image:
    if colour is None:
        raise DataError(
            f"{path} is transparent ({image.mode}). Put such images on a background: -D background=white, black or "
            f"#rrggbb."
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))


def _middle_square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    scaled = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return scaled.crop((left, top, left + size, top + size))
