"""Layers in faster forms while a model is attacked on a CPU; equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from at_smooth.network import Normalize
from at_smooth.winograd import IN, tiles, winograd_conv2d

#: Where Winograd's convolution is faster than the library's, as measured (docs/benchmarks.md).
_CHANNELS = 96  # of input and of output, at least
_TILES = 32  # of all images, at least
_WORK = 1 / 3  # of the multiplications, at most: small or odd sizes fill their tiles badly

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Let layers run in faster forms while the block runs, for an attack that searches with frozen weights.

    3x3 convolutions run by :mod:`at_smooth.winograd`; BatchNorm in eval mode, and the normalisation in front, as the
    affine maps that they are. It happens to layers of just these classes, in float32 on a CPU; their hooks run as ever.
    Whoever learns from what the attack finds, or judges it, does so by the layers as they are.

    Args:
        model: In the modes that it is attacked in.
    """
    if torch.is_autocast_enabled("cpu"):  # Winograd's transforms want more digits than bf16 has
        yield
        return
    compiled = model._compiled_call_impl is not None
    replaced = []
    try:
        for layer in model.modules():
            faster = _faster_convolution(layer) or _faster_affine(layer, compiled)
            if faster is not None and "forward" not in vars(layer):
                vars(layer)["forward"] = faster
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del vars(layer)["forward"]


def _faster_convolution(layer: nn.Module) -> Forward | None:
    if type(layer) is not nn.Conv2d or min(layer.in_channels, layer.out_channels) < _CHANNELS or layer.groups > 1:
        return None
    if (layer.kernel_size, layer.stride, layer.padding, layer.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
        return None
    return MethodType(_convolve, layer) if layer.padding_mode == "zeros" and _plain(layer.weight) else None


def _convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if weight.requires_grad or images.dtype != torch.float32 or not _pays(images):
        return nn.Conv2d.forward(layer, images)
    result = winograd_conv2d(images, weight)
    return result if bias is None else result + bias[:, None, None]


def _pays(images: Tensor) -> bool:
    height, width = images.shape[-2:]
    rows, columns = tiles(height, width)
    filled = IN * IN * rows * columns <= _WORK * 9 * height * width
    return filled and images.dim() == 4 and len(images) * rows * columns >= _TILES


def _faster_affine(layer: nn.Module, compiled: bool) -> Forward | None:
    """Normalisation by fixed numbers as one product and one sum."""
    if type(layer) is Normalize and not compiled:  # the compiler makes the first convolution slower after it
        return _affine(layer, 1 / layer.std.flatten(), -(layer.mean / layer.std).flatten())
    if not isinstance(layer, _BatchNorm) or type(layer) not in _BATCH_NORMS or layer.training:
        return None
    mean, variance, weight, bias = layer.running_mean, layer.running_var, layer.weight, layer.bias
    if mean is None or variance is None:
        return None
    with torch.no_grad():
        scale = (variance + layer.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        return _affine(layer, scale, -mean * scale if bias is None else bias - mean * scale)


def _affine(layer: nn.Module, scale: Tensor, shift: Tensor) -> Forward | None:
    return partial(_scale_and_shift, layer, scale, shift) if _plain(scale, shift) else None


def _scale_and_shift(layer: nn.Module, scale: Tensor, shift: Tensor, features: Tensor) -> Tensor:
    if features.dtype != torch.float32:
        return type(layer).forward(layer, features)  # type: ignore[no-any-return]
    if features.dim() > 2:
        by_channel = (-1, *[1] * (features.dim() - 2))
        scale, shift = scale.view(by_channel), shift.view(by_channel)
    return torch.addcmul(shift, features, scale)


def _plain(*tensors: Tensor) -> bool:
    """Whether tensors are float32 on a CPU."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
