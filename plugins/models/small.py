"""Small networks for small images."""

from __future__ import annotations

from math import prod

from pydantic import Field
from torch import nn

from at_smooth import Architecture, OptionError


class MLP(Architecture):
    """A multilayer perceptron with BatchNorm and ReLU after each hidden layer."""

    width: int = Field(default=512, ge=1, description="units in each hidden layer")
    depth: int = Field(default=2, ge=0, le=1000, description="hidden layers")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image shape."""
        layers: list[nn.Module] = [nn.Flatten()]
        features = prod(shape)
        for _ in range(self.depth):
            layers += [nn.Linear(features, self.width, bias=False), nn.BatchNorm1d(self.width), nn.ReLU()]
            features = self.width
        return nn.Sequential(*layers, nn.Linear(features, num_classes))


class ConvNet(Architecture):
    """A small convolutional network: stages of convolution, BatchNorm and ReLU that halve the image, then a head."""

    width: int = Field(default=32, ge=1, description="channels of the first stage; each later stage doubles them")
    stages: int = Field(default=2, ge=1, le=6, description="stages; each after the first halves the image")

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Any image of at least 2 ** (stages - 1) pixels a side."""
        channels, *size = shape
        if min(size) < 2 ** (self.stages - 1):
            raise OptionError(
                f"convnet: {self.stages} stages need images of at least {2 ** (self.stages - 1)} pixels a side, "
                f"not {size[0]}x{size[1]}. Lower -N stages."
            )
        layers: list[nn.Module] = []
        for stage in range(self.stages):
            width = self.width * 2**stage
            layers += [
                nn.Conv2d(channels, width, 3, stride=1 if stage == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
            size = size if stage == 0 else [(side + 1) // 2 for side in size]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * prod(size), num_classes))
