"""Models that work in place on their input: each gets a copy, so that the caller's images stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.normalize import Normalize


def with_own_input(model: nn.Module) -> nn.Module:
    """The model, which from now on runs on a copy of the images that it is given.

    A network of ours stays as it is: its normalisation makes a new tensor.
    """
    if not keeps_input(model):
        model.register_forward_pre_hook(_copies, prepend=True)
    return model


@contextmanager
def own_input(model: nn.Module) -> Iterator[None]:
    """The same while a block runs, for a model that is someone else's; one of TorchScript's takes no hooks."""
    if keeps_input(model) or isinstance(model, torch.jit.ScriptModule):
        yield
        return
    hook = model.register_forward_pre_hook(_copies, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def keeps_input(model: nn.Module) -> bool:
    """Whether a model is known to leave its input as it is."""
    ours = isinstance(model, nn.Sequential) and len(model) > 0 and isinstance(model[0], Normalize)
    return ours or _copies in model._forward_pre_hooks.values()


def _copies(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)
