"""Layers in faster forms on a CPU, for a model that is attacked and for a teacher; equal up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from at_smooth.fast_batchnorm import faster_batchnorm
from at_smooth.fast_convolution import faster_convolution
from at_smooth.folding import folded_sequence
from at_smooth.scratch import SCRATCH


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Let layers run in faster forms while the block runs, for an attack that searches with frozen weights.

    Large 3x3 convolutions run by :mod:`at_smooth.winograd`; BatchNorm in eval mode as the affine map that it is, or
    within the layer before it in an ``nn.Sequential``. It happens to layers of just torch's own classes, channels_last,
    in float32 on a CPU, whose weights are parameters that do not learn. Whoever learns from what the attack finds, or
    judges it, does so by the layers as they are.

    Args:
        model: In the modes that it is attacked in.
    """
    # under autocast nothing would be faster, see is_plain
    hastened = [] if torch.is_autocast_enabled("cpu") else hasten(model)
    try:
        with SCRATCH.kept():
            yield
    finally:
        for layer, faster in hastened:
            for name in faster:
                vars(layer).pop(name, None)


def hasten(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Let layers run in faster forms for good, as :func:`fast_layers` says.

    Args:
        model: In its modes; weights that are frozen will keep their values.

    Returns:
        The layers that are faster now, each with the attributes that make it so.
    """
    hastened = []
    for layer in model.modules():
        if "forward" not in vars(layer) and (faster := _faster(layer)):
            vars(layer).update(faster)
            hastened.append((layer, faster))
    return hastened


def _faster(layer: nn.Module) -> dict[str, Any]:
    return folded_sequence(layer) or faster_convolution(layer) or faster_batchnorm(layer)
