"""BatchNorm in eval mode within the linear layer or convolution before it, where an ``nn.Sequential`` runs both."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from at_smooth.fast_batchnorm import scale_and_shift
from at_smooth.fast_convolution import convolve_large, is_large
from at_smooth.plain_float32 import is_frozen, is_plain

_PAIRS = [(nn.Linear, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)]


def folded_sequence(layer: nn.Module) -> dict[str, Any]:
    """Attributes that make a sequence faster; none of any other layer, and where there is nothing to fold.

    The layers in it stay as they are, for whoever calls them one by one.
    """
    if type(layer) is not nn.Sequential:
        return {}
    steps: list[Callable[[Tensor], Tensor]] = []
    for step in layer:
        folded = _folded(steps[-1], step) if steps else None
        if folded is None:
            steps.append(step)
        else:
            steps[-1] = folded
    return {"forward": MethodType(_run, layer), "_folded_steps": steps} if len(steps) < len(layer) else {}


def _run(sequence: Any, input: Tensor) -> Tensor:
    for step in sequence._folded_steps:
        input = step(input)
    return input


def _folded(layer: Any, batchnorm: Any) -> Folded | None:
    if (type(layer), type(batchnorm)) not in _PAIRS or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or not is_frozen(weight) or (bias is not None and not is_frozen(bias)):
        return None
    if any("forward" in vars(each) for each in (layer, batchnorm)):
        return None
    found = scale_and_shift(batchnorm)
    return None if found is None or len(found[0]) != len(weight) else Folded(layer, batchnorm, *found)


def _is_watched(layer: nn.Module) -> bool:
    """Whether hooks want to see what goes through it, its own or those of all modules."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(hooks) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


class Folded:
    """BatchNorm(W x + b) as one map: (scale W) x + (scale b + shift).

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``.
        batchnorm: In eval mode.
        scale: Of BatchNorm, (C,).
        shift: Likewise.
    """

    def __init__(self, layer: Any, batchnorm: nn.Module, scale: Tensor, shift: Tensor) -> None:
        self._layer = layer
        self._batchnorm = batchnorm
        self._dims = 2 if type(layer) is nn.Linear else 4  # of a linear layer's other inputs, channels are not the last
        self._large = is_large(layer)
        with torch.no_grad():
            self._weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
            self._bias = shift if layer.bias is None else torch.addcmul(shift, layer.bias, scale)

    def __call__(self, features: Tensor) -> Tensor:
        """As the two layers, one after the other; those themselves run where this would not be right."""
        layer = self._layer
        watched = _is_watched(layer) or _is_watched(self._batchnorm)
        if watched or self._batchnorm.training or not is_plain(features) or features.dim() != self._dims:
            result: Tensor = self._batchnorm(layer(features))
            return result
        if self._dims == 2:
            return F.linear(features, self._weight, self._bias)
        found = convolve_large(features, self._weight, self._bias) if self._large else None
        if found is not None:
            return found
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(features, self._weight, self._bias, *how)
