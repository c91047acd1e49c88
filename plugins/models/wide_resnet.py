"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016), in the shape of the field's CIFAR models."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from at_smooth import Architecture


class WideBlock(nn.Module):
    """Two 3x3 convolutions, BatchNorm and ReLU before each, around a shortcut.

    Args:
        channels: Of the input.
        width: Of the output.
        stride: Of the first convolution.
        dropout: Probability of dropping between the convolutions.
    """

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        carried: Tensor = x if self.shortcut is None else self.shortcut(active)
        return residual + carried


class WideResNet(nn.Module):
    """A stem of 16 channels, three stages of wide blocks, BatchNorm, average pooling, a linear head.

    Args:
        depth: 6 n + 4, for n blocks in each stage.
        factor: How many times wider than 16, 32, 64 channels the stages are.
        channels: Of the images.
        num_classes: K.
        dropout: Probability of dropping within each block.
    """

    def __init__(self, depth: int, factor: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        features = 16
        for stage in range(3):
            width = 16 * factor * 2**stage
            for position in range((depth - 4) // 6):
                blocks.append(WideBlock(features, width, 2 if stage > 0 and position == 0 else 1, dropout))
                features = width
        self.stages = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, num_classes)
        for module in self.modules():  # the initial weights of the published models
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        features = F.relu(self.bn(self.stages(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class WRN344(Architecture):
    """Wide ResNet 34-4 (Table 3): 7.4 million parameters at 10 classes."""

    depth: int = Field(default=34, ge=10, le=1000, description="layers, 6 n + 4")
    width: int = Field(default=4, ge=1, description="how many times wider than a plain ResNet")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="probability of dropping within each block")

    @field_validator("depth")
    @classmethod
    def _six_n_and_four(cls, depth: int) -> int:
        if (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6 n + 4, as in 10, 16, 22, 28, 34")
        return depth

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image size; the paper's is 32x32."""
        return WideResNet(self.depth, self.width, shape[0], num_classes, self.dropout)


class WRN3410(WRN344):
    """Wide ResNet 34-10 (Table 3): 46.2 million parameters at 10 classes."""

    width: int = Field(default=10, ge=1, description="how many times wider than a plain ResNet")
