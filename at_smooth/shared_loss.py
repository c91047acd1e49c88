"""The training loss among several ranks: DistributedDataParallel around it, the classifier left raw for attacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from at_smooth.modes import kept_modes


class SharedLoss(nn.Module):
    """What DistributedDataParallel wraps: it calls whatever it is given, so a trial and the loss take the same way.

    Args:
        loss: Its parameters' gradients are averaged over the ranks.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call."""
        return call(*arguments)


def shared_among_ranks(loss: nn.Module, model: nn.Module, images: Tensor) -> DistributedDataParallel:
    """Wrap a loss, together on all ranks.

    A trial pass comes first. It says whether there are parameters that get no gradient, and lets torch arrange its
    buckets, which it does after a first backward pass: sums of three ranks and more depend on that arrangement in their
    last bits, and a resumed run is to add up as one that was never interrupted.

    Args:
        loss: The module to wrap; call it as ``wrapped(loss, ...)``.
        model: The classifier in it, raw; it stays as it is.
        images: A few, (N, C, H, W) in [0, 1], on its device.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with kept_modes(model), torch.enable_grad():
        model.eval()
        gradients = torch.autograd.grad(model.forward(images).sum(), learning, allow_unused=True)  # never compiled
        unused = any(gradient is None for gradient in gradients)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` has another name in newer torch
            wrapped = DistributedDataParallel(SharedLoss(loss), broadcast_buffers=False, find_unused_parameters=unused)
        wrapped(model.forward, images).sum().backward()
    for parameter in learning:
        parameter.grad = None
    return wrapped
