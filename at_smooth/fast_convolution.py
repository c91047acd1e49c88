"""3x3 convolutions of many channels by :mod:`at_smooth.winograd`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.plain_float32 import is_frozen, is_plain
from at_smooth.processor import processor_name
from at_smooth.winograd import PLACES, tiles, winograd_conv2d

#: Where Winograd's convolution is faster than the library's, as measured (docs/benchmarks.md).
_CHANNELS = 96  # of input and of output, at least
_TILES = 32  # of all images, at least
_WORK = 1 / 3  # of the multiplications, at most: small or odd sizes fill their tiles badly


def faster_convolution(layer: nn.Module) -> dict[str, Any]:
    """Attributes that make a layer faster; none where it is not."""
    return {"forward": partial(_forward, layer)} if is_large(layer) else {}


def products_are_fast() -> bool:
    """Whether products of matrices come near the rate of convolutions here, as Winograd needs.

    By MKL they reach four fifths of it on an Intel Xeon. On an AMD EPYC they reach less than half, and Winograd takes
    longer than it saves (docs/benchmarks.md). Others were not measured; Intel's are taken to be alike.
    """
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and "Intel" in processor_name()


def is_large(layer: nn.Module) -> bool:
    """Whether a layer is a frozen 3x3 convolution in channels_last, of so many channels that Winograd may pay here."""
    if not products_are_fast():
        return False
    if type(layer) is not nn.Conv2d or min(layer.in_channels, layer.out_channels) < _CHANNELS or layer.groups > 1:
        return False
    if (layer.kernel_size, layer.stride, layer.padding, layer.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
        return False
    weight = layer._parameters.get("weight")  # what weight_norm and its like compute is no parameter
    if layer.padding_mode != "zeros" or weight is None or not is_frozen(weight):
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def convolve_large(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A large layer's convolution by Winograd; None where it does not pay for these images."""
    if not is_plain(images) or not _pays(images):
        return None
    result = winograd_conv2d(images, weight)
    return result if bias is None else result + bias[:, None, None]


def _forward(layer: Any, input: Tensor) -> Tensor:
    result = convolve_large(input, layer.weight, layer.bias) if is_frozen(layer.weight) else None
    if result is None:
        result = nn.Conv2d.forward(layer, input)
    return result


def _pays(images: Tensor) -> bool:
    height, width = images.shape[-2:]
    rows, columns = tiles(height, width)
    filled = PLACES * rows * columns <= _WORK * 9 * height * width
    return filled and images.dim() == 4 and len(images) * rows * columns >= _TILES
