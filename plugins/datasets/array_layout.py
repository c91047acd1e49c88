"""Arrays of images in any of the usual layouts, to one; where there is doubt, a question in place of a guess."""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal, NamedTuple

import numpy as np

from at_smooth import DataError, notify

Layout = Literal["nchw", "nhwc"]
Array = np.ndarray[Any, Any]

_AXIS = {"nchw": 1, "nhwc": 3}
_PLAIN = (1, 3)  # grey, colour
_WITH_ALPHA = (2, 4)


class Stated(NamedTuple):
    """What the user says of the arrays.

    Attributes:
        layout: Where the channels are; None to find it out.
        channels: How many there are; None for grey or colour.
    """

    layout: Layout | None
    channels: int | None


def channels_first(name: str, array: Array, n: int, stated: Stated) -> tuple[Array, Layout | None]:
    """Bring images to (N, C, H, W).

    Args:
        name: The array's, for messages.
        array: (N, H, W), (N, H, W, C) or (N, C, H, W).
        n: How many labels there are.
        stated: What the user says.

    Returns:
        The images, an opaque alpha channel left out, and where the channels were; None where there was no such axis.

    Raises:
        DataError: The shape is none of these, or fits several; the message says what to state.
    """
    shape = array.shape
    if array.ndim not in (3, 4):
        side = isqrt(shape[1]) if array.ndim == 2 else 0
        rows = f", as by {name}.reshape(-1, {side}, {side})" if side and side * side == shape[1] else ""
        raise DataError(f"{name} has shape {shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W){rows}.")
    if shape[0] != n:
        order = (2, 0, 1) if array.ndim == 3 else (3, 2, 0, 1)
        last = f" Where the last axis counts the images, give {name}.transpose{order}." if shape[-1] > shape[0] else ""
        raise DataError(f"{name} has shape {shape}, so {shape[0]} images, but there are {n} labels.{last}")
    if array.ndim == 3:
        return array[:, None], None
    layout = stated.layout or _layout(name, shape, stated.channels)
    first = array if layout == "nchw" else array.transpose(0, 3, 1, 2)
    return _plain(name, first, stated.channels), layout


def _layout(name: str, shape: tuple[int, ...], channels: int | None) -> Layout:
    kinds = [(channels,)] if channels else [_PLAIN, _WITH_ALPHA]
    for kind in kinds:
        fitting: list[Layout] = [layout for layout in ("nchw", "nhwc") if shape[_AXIS[layout]] in kind]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise DataError(
                f"{name} has shape {shape}, whose channels may be first or last. Say which: -D layout=nchw or "
                f"-D layout=nhwc."
            )
    if channels:
        raise DataError(f"{name} has shape {shape}, without an axis of {channels} channels. Correct -D channels.")
    raise DataError(
        f"{name} has shape {shape}, where neither axis of channels has 1 or 3 of them. Say what there is: "
        f"-D layout=nhwc -D channels={shape[3]}, or -D layout=nchw -D channels={shape[1]}."
    )


def _plain(name: str, images: Array, channels: int | None) -> Array:
    """Images (N, C, H, W) without an opaque alpha channel, which holds no picture."""
    found = images.shape[1]
    if found == channels or (channels is None and found in _PLAIN):
        return images
    keep = f"keep all {found} channels by -D channels={found}"
    if channels is not None or found not in _WITH_ALPHA:
        raise DataError(f"{name} has {found} channels. Correct -D layout or -D channels, or {keep}.")
    opaque = np.iinfo(images.dtype).max if images.dtype.kind in "iu" else 1
    if not (images[:, -1] == opaque).all():
        raise DataError(
            f"{name} has {found} channels, and the last is no opaque alpha channel (all {opaque}). Put transparent "
            f"images on a background, or {keep}."
        )
    notify(f"{name}: the last of {found} channels is an opaque alpha channel; it is left out")
    return images[:, :-1]
