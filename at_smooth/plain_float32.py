"""Where faster forms of layers are right: in float32 on a CPU, with weights that do not learn."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(features: Tensor) -> bool:
    """Whether a layer sees float32 on a CPU, and no autocast, in whose digits Winograd's transforms would be wrong."""
    return _is_float32_here(features) and not torch.is_autocast_enabled("cpu")


def is_frozen(tensor: Tensor) -> bool:
    """Whether it is float32 on a CPU and does not learn."""
    return not tensor.requires_grad and _is_float32_here(tensor)


def _is_float32_here(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
