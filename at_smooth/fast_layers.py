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

    Large 3x3 convolutions in channels_last run by :mod:`at_smooth.winograd` where that pays on this processor;
    BatchNorm in eval mode as the affine map that it is, or within the layer before it in an ``nn.Sequential``. It
    happens to layers of just torch's own classes, in float32 on a CPU, whose weights are parameters that do not
    learn. Whoever learns from what the attack finds, or judges it, does so by the layers as they are.

    Args:
        model: In the modes that it is attacked in.
    """
    hastened: list[tuple[nn.Module, dict[str, Any]]] = []
    in_vain = torch.is_autocast_enabled("cpu")  # nothing would be faster, see is_plain
    try:
        for layer in () if in_vain else model.modules():
            if "forward" not in vars(layer):
                faster = folded_sequence(layer) or faster_convolution(layer) or faster_batchnorm(layer)
                hastened.append((layer, faster))
                vars(layer).update(faster)
        with SCRATCH.kept():
            yield
    finally:
        for layer, faster in hastened:
            for name in faster:
                vars(layer).pop(name, None)


def hasten_convolutions(model: nn.Module) -> None:
    """Let a teacher's large 3x3 convolutions run by :mod:`at_smooth.winograd` from here on, where that pays.

    Their weights are read, and asked whether they learn, in each pass; so a teacher may be loaded with others.
    """
    for layer in model.modules():
        if "forward" not in vars(layer):
            vars(layer).update(faster_convolution(layer))
