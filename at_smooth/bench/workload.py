"""What is timed: a recipe on made-up images of one shape, and in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from at_smooth.attacks import PGD
from at_smooth.data import Data, Part
from at_smooth.exceptions import OptionError
from at_smooth.network import build_network
from at_smooth.recipe import Recipe
from at_smooth.runtime import generator

_BATCHES = 20  # of an epoch: what an epoch's beginning costs comes once in so many steps, and no median sees it
_EPOCHS = 10**6  # no contender comes to its end


@dataclass(frozen=True)
class Variant:
    """One arithmetic of the engine.

    Attributes:
        precision: ``"fp32"`` or ``"bf16"``.
        compile: Whether the model is compiled.
        direct: Whether attacks and teachers run torch's own layers, without :mod:`at_smooth.fast_layers`.
    """

    precision: str = "fp32"
    compile: bool = False
    direct: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a precision, ``fp32`` or ``bf16``, and what is added to it: ``+compile``, ``+direct``.

        Raises:
            OptionError: It is neither, or something else or the same again is added.
        """
        precision, *added = text.split("+")
        if precision not in ("fp32", "bf16") or not set(added) <= {"compile", "direct"} or len(set(added)) < len(added):
            raise OptionError(
                f"there is no variant '{text}'. Give fp32 or bf16, with +compile, +direct or both, as in fp32+compile."
            )
        return cls(precision, "compile" in added, "direct" in added)

    @property
    def key(self) -> str:
        """Its name in keys of JSON, as in ``bf16_compile``."""
        return str(self).replace("+", "_")

    @property
    def passes(self) -> Variant:
        """The variant whose bare passes it is held against: they run torch's own layers anyhow."""
        return replace(self, direct=False)

    def __str__(self) -> str:
        return self.precision + "+compile" * self.compile + "+direct" * self.direct


@dataclass(frozen=True)
class Workload:
    """What every contender works on, the same for each of them.

    Attributes:
        recipe: Model, batch size, attack, threads and device; trained by the method and the attack that recipes
            default to, without augmentation.
        shape: (C, H, W) of the images.
        num_classes: K.
    """

    recipe: Recipe
    shape: tuple[int, int, int]
    num_classes: int

    def __post_init__(self) -> None:
        if type(self.recipe.attack_spec) is not PGD:
            raise OptionError(f"the plain loop and the bare passes know PGD alone, not {self.recipe.attack}.")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Workload:
        """What :meth:`to_dict` gave."""
        return cls(Recipe(**fields["recipe"]), tuple(fields["shape"]), fields["num_classes"])

    def to_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {"recipe": self.recipe.to_dict(), "shape": list(self.shape), "num_classes": self.num_classes}

    @property
    def attack(self) -> PGD:
        """The attack to train on."""
        spec = self.recipe.attack_spec
        if not isinstance(spec, PGD):  # seen to when the workload was made
            raise OptionError(f"attack {spec.name} is no PGD.")
        return spec

    @property
    def settings(self) -> Recipe:
        """The recipe without an end and without measurements, which no step is made of."""
        return self.recipe.replacing(epochs=_EPOCHS, validate_every=_EPOCHS, test_every=0)

    @cached_property
    def data(self) -> Data:
        """Made-up images, uint8, and labels; always the same."""
        rng = generator(0, 0, "bench")
        n = _BATCHES * self.recipe.batch_size
        images = torch.randint(0, 256, (n, *self.shape), dtype=torch.uint8, generator=rng)
        train = Part(images, torch.arange(n) % self.num_classes)
        few = Part(images[:2], train.labels[:2])
        return Data(train, few, few, self.num_classes)

    def network(self) -> nn.Module:
        """The network with its initial weights, always the same; on the CPU, contiguous."""
        return build_network(self.recipe, self.shape, self.num_classes, self.data.pixel_statistics())
