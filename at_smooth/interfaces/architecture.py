"""A network's architecture."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from at_smooth.interfaces.plugin import Plugin


class Architecture(Plugin):
    """Builds a network. Normalisation is not its concern: the core puts it in front."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """An untrained network from images (N, C, H, W) to logits (N, K).

        Args:
            shape: (C, H, W).
            num_classes: K.

        Raises:
            OptionError: The architecture cannot take images of that shape.
        """
