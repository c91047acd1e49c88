"""BatchNorm statistics for averaged weights: the average was never run on data, so its statistics are stale."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from at_smooth.ranks import Ranks


def refresh_batchnorm(
    model: nn.Module, batches: Iterable[Tensor], raw: nn.Module | None = None, ranks: Ranks | None = None
) -> None:
    """Recompute the running statistics of every BatchNorm layer in one pass over clean training images.

    The published code weighs each batch by its size, where ``torch.optim.swa_utils.update_bn`` weighs all alike; so
    the momentum is set as the batches go by, and torch does the rest (reset, modes, momenta put back).

    Args:
        model: The averaged model; the only thing that changes.
        batches: Image tensors (N, C, H, W) in [0, 1], on the model's device.
        raw: The model that was averaged; layers that it holds in eval mode keep their statistics.
        ranks: Among whom the batches are dealt out, this rank's being ``batches``; the default is this process alone.
            The result is that of all batches, the same everywhere.
    """
    ranks, seen = ranks or Ranks(), 0
    training = {name: module.training for name, module in (raw or nn.Module()).named_modules()}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    frozen = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items() if not training.get(name, True)}

    def weighed() -> Iterator[Tensor]:
        for name, statistics in frozen.items():  # update_bn has just reset all and put all in train mode
            norms[name].load_state_dict(statistics)
            norms[name].eval()
        nonlocal seen
        for images in batches:
            seen += len(images)
            for norm in norms.values():
                norm.momentum = len(images) / seen
            yield images

    update_bn(weighed(), model)
    moving = [norm.num_batches_tracked for name, norm in norms.items() if name not in frozen]
    tracked = [number for number in moving if number is not None]
    sums = [ranks.total(number) for number in tracked]
    ranks.even_out(model, weight=seen)
    with torch.no_grad():
        for number, everyones in zip(tracked, sums, strict=True):
            number.copy_(everyones)
