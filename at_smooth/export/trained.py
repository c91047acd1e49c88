"""What is exported: one network with one set of weights, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.experiment import Weights, Which, stored_weights
from at_smooth.recipe import Recipe
from at_smooth.run import Run


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        network: In eval mode, on the CPU, images in [0, 1] to logits.
        path: The checkpoint file.
        content: What the file holds.
        weights: ``"raw"`` or ``"smoothed"``.
        run: The run that the file belongs to, if it lies in one.
    """

    network: nn.Module
    path: Path
    content: dict[str, Any]
    weights: str
    run: Run | None

    @classmethod
    def find(cls, source: Path, weights: Weights, which: Which) -> Trained:
        """See :func:`at_smooth.load_model`, which explains the arguments and what it raises."""
        stored = stored_weights(source, weights, which)
        return cls(stored.network(), stored.path, stored.content, stored.kind, stored.run)

    @cached_property
    def recipe(self) -> Recipe:
        """What it was trained with."""
        return Recipe(self.path, **self.content["recipe"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.content["shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.content["num_classes"])

    @property
    def moment(self) -> str | None:
        """``"best"`` or ``"final"``; None for a checkpoint by another name."""
        name = self.path.stem.removesuffix("_smoothed")
        return name if name in ("best", "final") else None

    @property
    def title(self) -> str:
        """What it is, in a line."""
        recipe = self.recipe
        return f"{recipe.model} on {recipe.dataset}, trained by {recipe.method} for {recipe.threat}"

    @cached_property
    def images(self) -> Tensor:
        """Made-up images to compare logits on, (8, C, H, W) in [0, 1], always the same."""
        return torch.rand(8, *self.shape, generator=torch.Generator().manual_seed(0))

    @cached_property
    def logits(self) -> Tensor:
        """What the network says of them, (8, K)."""
        with torch.no_grad():
            logits: Tensor = self.network(self.images)
        return logits
