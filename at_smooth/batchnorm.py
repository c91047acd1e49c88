"""BatchNorm statistics for averaged weights: the average was never run on data, so its statistics are stale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def refresh_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics of every BatchNorm layer in one pass over clean training images.

    The published code weighs each batch by its size, where ``torch.optim.swa_utils.update_bn`` weighs all alike; so
    the momentum is set as the batches go by, and torch does the rest (reset, modes, momenta put back).

    Args:
        model: The averaged model; the only thing that changes.
        batches: Image tensors (N, C, H, W) in [0, 1], on the model's device.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def weighed() -> Iterator[Tensor]:
        seen = 0
        for images in batches:
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen
            yield images

    update_bn(weighed(), model)
