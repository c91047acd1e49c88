"""BatchNorm in eval mode as the affine map that it is: (x - mean) / sqrt(variance + eps) * weight + bias."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from at_smooth.plain_float32 import is_frozen, is_plain

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def faster_batchnorm(layer: nn.Module) -> dict[str, Any]:
    """Attributes that make a layer faster; none where it is not."""
    found = scale_and_shift(layer)
    if found is None:
        return {}
    return {"forward": MethodType(_normalize, layer), "_fast_scale": found[0], "_fast_shift": found[1]}


def scale_and_shift(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """BatchNorm's map as x * scale + shift, (C,) each; None of a layer that is or does something else, or learns."""
    if not isinstance(layer, _BatchNorm) or type(layer) not in _BATCH_NORMS or layer.training:
        return None
    mean, variance = layer.running_mean, layer.running_var
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    changing = layer._forward_pre_hooks or (layer.affine and (weight is None or bias is None))
    if changing or mean is None or variance is None:
        return None
    if not all(is_frozen(tensor) for tensor in (mean, variance, weight, bias) if tensor is not None):
        return None
    with torch.no_grad():
        scale = (variance + layer.eps).rsqrt()
        if weight is not None:
            scale *= weight
        return scale, torch.addcmul(torch.zeros_like(mean) if bias is None else bias, mean, scale, value=-1)


def _normalize(layer: Any, input: Tensor) -> Tensor:
    if layer.training or not is_plain(input) or input.dim() < 2 or input.shape[1] != layer.num_features:
        result: Tensor = type(layer).forward(layer, input)
        return result
    layer._check_input_dim(input)
    by_channel = (-1, *[1] * (input.dim() - 2))
    return torch.addcmul(layer._fast_shift.view(by_channel), input, layer._fast_scale.view(by_channel))
