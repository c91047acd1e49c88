"""Normalisation as a layer: the core puts it in front of every network that it builds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation, by channel; part of the model, so eps stays in pixels.

    Args:
        mean: One number a channel, in [0, 1] units.
        std: Likewise, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to the same shape, normalised."""
        return (images - self.mean) / self.std
