"""The rate at which the machine does a network's own convolutions, each alone: what a step can be held against."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from at_smooth.modes import kept_modes

_RUNS = 5  # of each layer in a round
_SECONDS = 0.002  # at least, between two looks at the clock


@dataclass(frozen=True)
class Layer:
    """One kind of layer of a network.

    Attributes:
        module: A layer of this kind.
        shape: Of its input.
        count: How many of the network's layers are of this kind.
    """

    module: nn.Module
    shape: tuple[int, ...]
    count: int


def layers_of(model: nn.Module, images: Tensor) -> list[Layer]:
    """The convolutions that one forward pass does; the linear layers where it does none.

    Layers of the same form on inputs of the same shape are one kind.

    Args:
        model: From images to logits, on their device; stays as it is.
        images: (N, C, H, W).
    """
    for kind in (_ConvNd, nn.Linear):
        found: dict[str, Layer] = {}

        def note(module: nn.Module, inputs: Any, output: Any, found: dict[str, Layer] = found) -> None:
            shape = tuple(inputs[0].shape)
            known = found.get(f"{module} {shape}")
            found[f"{module} {shape}"] = Layer(module, shape, known.count + 1 if known else 1)

        hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kind)]
        with kept_modes(model), torch.no_grad():
            model.eval()(images)
        for hook in hooks:
            hook.remove()
        if found:
            return list(found.values())
    return []


class Stand:
    """One layer by itself, ready to be timed.

    Args:
        layer: Which; a copy of it is made.
        device: Where it runs.
        dtype: In which arithmetic.
    """

    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
        self.count = layer.count
        self._device = device
        self._module = copy.deepcopy(layer.module).to(device, dtype).requires_grad_(False)
        self._input = torch.randn(layer.shape, device=device).to(dtype)
        if len(layer.shape) == 4:
            self._module = self._module.to(memory_format=torch.channels_last)
            self._input = self._input.to(memory_format=torch.channels_last)
        self._input.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            self._output = self._module(self._input)
        self.flops = int(counter.get_total_flops())
        self._gradient = torch.randn_like(self._output)
        self._repeats = {run: self._calibrated(run) for run in (self._forward, self._backward)}

    def forward_seconds(self) -> float:
        """Seconds of one forward pass, the median of some."""
        return self._timed(self._forward)

    def backward_seconds(self) -> float:
        """Seconds of one backward pass to the input alone, as an attack does them, likewise."""
        return self._timed(self._backward)

    def _forward(self) -> None:
        with torch.no_grad():
            self._module(self._input)

    def _backward(self) -> None:
        torch.autograd.grad(self._output, self._input, self._gradient, retain_graph=True)

    def _calibrated(self, run: Callable[[], None]) -> int:
        run()
        return max(1, round(_SECONDS / max(self._seconds(run, 1), 1e-9)))

    def _timed(self, run: Callable[[], None]) -> float:
        return median(self._seconds(run, self._repeats[run]) for _ in range(_RUNS))

    def _seconds(self, run: Callable[[], None], repeats: int) -> float:
        synchronize(self._device)
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(self._device)
        return (time.perf_counter() - began) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
