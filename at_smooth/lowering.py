"""Weights in the arithmetic of autocast, converted once instead of in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Layers whose weights autocast converts whenever they are used: these and none derived from them, which may do
#: anything with their weights before.
_CONVERTED = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
}


@contextmanager
def converted_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the layers that autocast would convert hold converted copies while the block runs, without gradients.

    The results are those of autocast, which keeps no converted copy of a frozen weight: an attack of ten steps would
    convert all weights ten times.

    Args:
        model: Its parameters are the same objects as before when the block ends.
        dtype: Of the copies.
    """
    layers = _layers(model)
    before = [dict(layer._parameters) for layer in layers]
    try:
        _convert(layers, dtype)
        yield
    finally:
        for layer, parameters in zip(layers, before, strict=True):
            layer._parameters.update(parameters)


class Converted(nn.Module):
    """A network that does not learn, its weights converted for good; it runs under autocast wherever it is called.

    Args:
        model: In eval mode; it is changed.
        dtype: Of autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        _convert(_layers(model), dtype)
        self.model = model
        self._dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to logits (N, K)."""
        with torch.autocast(images.device.type, dtype=self._dtype):
            logits: Tensor = self.model(images)
        return logits


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in _CONVERTED]


def _convert(layers: list[nn.Module], dtype: torch.dtype) -> None:
    for layer in layers:
        for name, weight in layer._parameters.items():
            # what a parametrization made of a weight has another name, such as weight_orig
            if name in ("weight", "bias") and weight is not None and weight.dtype == torch.float32:
                layer._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
