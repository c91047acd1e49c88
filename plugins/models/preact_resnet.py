"""Pre-activation residual networks (He et al., ECCV 2016), in the shape of the field's CIFAR models."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from at_smooth import Architecture


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, BatchNorm and ReLU before each, around a shortcut.

    Args:
        channels: Of the input.
        width: Of the convolutions, and of the output.
        stride: Of the first convolution.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        carried: Tensor = x if self.shortcut is None else self.shortcut(active)
        return residual + carried


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, BatchNorm and ReLU before each, around a shortcut.

    Args:
        channels: Of the input.
        width: Of the inner convolutions; the output has four times as many.
        stride: Of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.shortcut = _shortcut(channels, self.expansion * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, 4 width, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        residual = self.conv3(F.relu(self.bn3(residual)))
        carried: Tensor = x if self.shortcut is None else self.shortcut(active)
        return residual + carried


class PreActResNet(nn.Module):
    """A stem, four stages that double the width and halve the image, BatchNorm, average pooling, a linear head.

    Args:
        block: What the stages are made of.
        blocks: How many of them each of the four stages has.
        channels: Of the images.
        num_classes: K.
        width: Channels of the stem.
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        blocks: tuple[int, int, int, int],
        channels: int,
        num_classes: int,
        width: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        features = width
        for stage, depth in enumerate(blocks):
            for position in range(depth):
                stages.append(block(features, width * 2**stage, 2 if stage > 0 and position == 0 else 1))
                features = block.expansion * width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        features = F.relu(self.bn(self.stages(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class PreActResNet18(Architecture):
    """PreActResNet-18, the paper's "ResNet-18": 11.2 million parameters at 10 classes."""

    width: int = Field(default=64, ge=1, description="channels of the first stage")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image size; the paper's is 32x32."""
        return PreActResNet(PreActBlock, (2, 2, 2, 2), shape[0], num_classes, self.width)


class PreActResNet50(Architecture):
    """PreActResNet-50, the paper's unseen robust model (Figure 4): 23.5 million parameters at 10 classes."""

    width: int = Field(default=64, ge=1, description="channels of the first stage's inner convolutions")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image size; the paper's is 32x32."""
        return PreActResNet(PreActBottleneck, (3, 4, 6, 3), shape[0], num_classes, self.width)


def _shortcut(channels: int, width: int, stride: int) -> nn.Module | None:
    same = stride == 1 and channels == width
    return None if same else nn.Conv2d(channels, width, 1, stride, bias=False)
