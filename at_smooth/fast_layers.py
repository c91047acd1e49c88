"""Layers in faster forms on a CPU, for a model that is attacked and for a teacher; equal up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from at_smooth.scratch import SCRATCH
from at_smooth.winograd import PLACES, tiles, winograd_conv2d

#: Where Winograd's convolution is faster than the library's, as measured (docs/benchmarks.md).
_CHANNELS = 96  # of input and of output, at least
_TILES = 32  # of all images, at least
_WORK = 1 / 3  # of the multiplications, at most: small or odd sizes fill their tiles badly

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Let layers run in faster forms while the block runs, for an attack that searches with frozen weights.

    3x3 convolutions run by :mod:`at_smooth.winograd`, and BatchNorm in eval mode as the affine map that it is. It
    happens to layers of just torch's own classes, channels_last, in float32 on a CPU, whose weights are parameters that
    do not learn. Whoever learns from what the attack finds, or judges it, does so by the layers as they are.

    Args:
        model: In the modes that it is attacked in.
    """
    # under autocast nothing would be faster, see _plain
    hastened = [] if torch.is_autocast_enabled("cpu") else _hasten(model)
    try:
        with SCRATCH.kept():
            yield
    finally:
        for layer, faster in hastened:
            for name in faster:
                vars(layer).pop(name, None)


class Hastened(nn.Module):
    """A network that does not learn, its layers in faster forms for good, as :func:`fast_layers` says.

    Args:
        model: Frozen, in eval mode, with the weights that it will keep; it is changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _hasten(model)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to logits (N, K)."""
        with SCRATCH.kept():
            logits: Tensor = self.model(images)
        return logits


def _hasten(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The layers that are faster now, each with the attributes that make it so."""
    hastened = []
    for layer in model.modules():
        if "forward" not in vars(layer) and (faster := _faster_convolution(layer) or _faster_batchnorm(layer)):
            vars(layer).update(faster)
            hastened.append((layer, faster))
    return hastened


def _faster_convolution(layer: nn.Module) -> dict[str, Any]:
    """Attributes that make a layer faster; none where it is not."""
    if type(layer) is not nn.Conv2d or min(layer.in_channels, layer.out_channels) < _CHANNELS or layer.groups > 1:
        return {}
    if (layer.kernel_size, layer.stride, layer.padding, layer.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
        return {}
    weight = layer._parameters.get("weight")  # what weight_norm and its like compute is no parameter
    if layer.padding_mode != "zeros" or weight is None or not _frozen(weight):
        return {}
    return {"forward": MethodType(_convolve, layer)} if weight.is_contiguous(memory_format=torch.channels_last) else {}


def _convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
    if not _plain(images) or not _pays(images):
        return nn.Conv2d.forward(layer, images)
    result = winograd_conv2d(images, layer.weight)
    return result if layer.bias is None else result + layer.bias[:, None, None]


def _pays(images: Tensor) -> bool:
    height, width = images.shape[-2:]
    rows, columns = tiles(height, width)
    filled = PLACES * rows * columns <= _WORK * 9 * height * width
    return filled and images.dim() == 4 and len(images) * rows * columns >= _TILES


def _faster_batchnorm(layer: nn.Module) -> dict[str, Any]:
    """Likewise: (x - mean) / sqrt(variance + eps) * weight + bias as scale * x + shift."""
    if not isinstance(layer, _BatchNorm) or type(layer) not in _BATCH_NORMS or layer.training:
        return {}
    mean, variance = layer.running_mean, layer.running_var
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    changing = layer._forward_pre_hooks or (layer.affine and (weight is None or bias is None))
    if changing or mean is None or variance is None:
        return {}
    if not all(_frozen(tensor) for tensor in (mean, variance, weight, bias) if tensor is not None):
        return {}
    with torch.no_grad():
        scale = (variance + layer.eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
    return {"forward": MethodType(_scale_and_shift, layer), "_scale": scale, "_shift": shift}


def _scale_and_shift(layer: Any, features: Tensor) -> Tensor:
    if layer.training or not _plain(features) or features.dim() < 2 or features.shape[1] != layer.num_features:
        result: Tensor = type(layer).forward(layer, features)
        return result
    layer._check_input_dim(features)
    by_channel = (-1, *[1] * (features.dim() - 2))
    return torch.addcmul(layer._shift.view(by_channel), features, layer._scale.view(by_channel))


def _frozen(tensor: Tensor) -> bool:
    return not tensor.requires_grad and _is_float32_here(tensor)


def _plain(features: Tensor) -> bool:
    """Whether a layer sees float32 on a CPU, and no autocast, in whose digits Winograd's transforms would be wrong."""
    return _is_float32_here(features) and not torch.is_autocast_enabled("cpu")


def _is_float32_here(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
