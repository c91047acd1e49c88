"""VGG (Simonyan and Zisserman, ICLR 2015) with BatchNorm, in the shape of the field's CIFAR models."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from at_smooth import Architecture

#: Convolutions of each block, by width in units of the first block's.
_VGG16 = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class VGG(nn.Module):
    """Blocks of 3x3 convolution, BatchNorm and ReLU with max pooling between, then one linear layer.

    Images of fewer than 32 pixels a side skip the poolings that they have no room for; what larger ones have left
    over is averaged.

    Args:
        blocks: Widths of each block's convolutions.
        shape: (C, H, W).
        num_classes: K.
    """

    def __init__(self, blocks: list[list[int]], shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, *size = shape
        side = min(size)
        layers: list[nn.Module] = []
        for block in blocks:
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


class VGG16(Architecture):
    """VGG-16 with BatchNorm (Table 3): 14.7 million parameters at 10 classes."""

    width: int = Field(default=64, ge=1, description="channels of the first block")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image size; the paper's is 32x32."""
        return VGG([[self.width * factor for factor in block] for block in _VGG16], shape, num_classes)
