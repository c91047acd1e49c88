"""From a threat to an attack: torchattacks objects, bound to a model that they leave as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from torch import Tensor, nn

from at_smooth.exceptions import OptionError, explain

Norm = Literal["Linf", "L2"]


def parse_pixels(value: Any) -> Any:
    """Read a length in pixel units: a number, or a fraction such as ``"8/255"``.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, str):
        return value
    numerator, slash, denominator = value.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is neither a number nor a fraction; write it as 8/255 or 0.0314") from None


def format_pixels(value: float) -> float | str:
    """A length as people of the field write it: ``0.2``, and ``"8/255"`` where a decimal would not end."""
    levels = round(value * 255)
    fraction = f"{levels}/255"
    return fraction if levels and levels / 255 == value and len(fraction) < len(repr(value)) else value


def _optional(value: float | None) -> float | str | None:
    return None if value is None else format_pixels(value)


#: A length in [0, 1] pixel units, read from a number or a fraction, written as a fraction where that is exact.
Pixels = Annotated[float, BeforeValidator(parse_pixels), PlainSerializer(format_pixels, when_used="json")]
#: The same, or None.
OptionalPixels = Annotated[float | None, BeforeValidator(parse_pixels), PlainSerializer(_optional, when_used="json")]


@dataclass(frozen=True)
class Threat:
    """What the adversary may do: move an image by at most ``eps`` in ``norm``, in [0, 1] pixel units."""

    norm: Norm
    eps: float

    def __str__(self) -> str:
        return f"{self.norm}, eps {format_pixels(self.eps)}"


#: Step size over eps where none is given: the paper's 2/255 for 8/255, and 15/255 for 128/255 (A2.2).
_STEP_OVER_EPS: dict[str, float] = {"Linf": 1 / 4, "L2": 15 / 128}


class AttackSpec(BaseModel):
    """One attack, not yet bound to a model. The fields after ``threat`` are the options ``-A``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["pgd"] = "pgd"
    threat: Threat = Field(exclude=True)
    steps: int = Field(default=10, ge=0, description="gradient steps")
    step_size: OptionalPixels = Field(
        default=None, ge=0, description="length of a step; default eps/4 in Linf, eps*15/128 in L2 (the paper's)"
    )
    random_start: bool = Field(default=True, description="start at a random point of the ball")
    mode: Literal["train", "eval"] = Field(
        default="train",
        description="the model's mode while it is attacked in training; in 'train', as in the paper's published "
        "code, BatchNorm uses the batch's statistics and its running ones move",
    )

    @classmethod
    def parse(cls, name: str, threat: Threat, options: dict[str, Any]) -> AttackSpec:
        """Validate a name and its options.

        Raises:
            OptionError: The attack or an option is unknown, or an option is out of bounds.
        """
        if name != "pgd":
            raise OptionError(f"there is no attack '{name}'. Attacks: pgd.")
        try:
            spec = cls(name="pgd", threat=threat, **options)
        except (ValidationError, TypeError) as error:
            if isinstance(error, TypeError):  # an option called 'name' or 'threat'
                raise OptionError(f"attack {name}: {error}") from None
            raise explain(error, f"attack {name}") from None
        if spec.step_size is None:
            spec = spec.model_copy(update={"step_size": threat.eps * _STEP_OVER_EPS[threat.norm]})
        return spec

    def for_evaluation(self, steps: int) -> AttackSpec:
        """The attack of the protocol's tests: as many steps as given, from a random start, in eval mode."""
        return self.model_copy(update={"steps": steps, "random_start": True, "mode": "eval"})

    def options(self) -> dict[str, Any]:
        """The options ``-A`` with their values, in plain types."""
        return self.model_dump(mode="json", exclude={"name", "threat"})


class Adversary:
    """An attack bound to a model.

    When a call returns, every module's mode and every parameter's ``requires_grad`` is as it was before.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K), already on its device.
        spec: The attack.
    """

    def __init__(self, model: nn.Module, spec: AttackSpec) -> None:
        self.spec = spec
        self._model = model
        self._attack = _torchattack(_Shield(model), spec)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images.

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: True classes, (N,).

        Returns:
            Images within eps of the given ones, in [0, 1], detached.
        """
        if self.spec.threat.eps == 0:  # the L2 projection would divide nothing by nothing
            return images.clone()
        with _attackable(self._model, self.spec.mode):
            perturbed: Tensor = self._attack(images, labels)
        return perturbed


class _Shield(nn.Module):
    """What torchattacks sees of the model: it may run it, and cannot switch its modes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits.float()  # under autocast the attack's loss stays in full precision

    def train(self, mode: bool = True) -> _Shield:
        return self


def _torchattack(model: nn.Module, spec: AttackSpec) -> Any:
    import torchattacks

    attack = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[spec.threat.norm]
    return attack(model, spec.threat.eps, spec.step_size, spec.steps, spec.random_start)


@contextmanager
def _attackable(model: nn.Module, mode: str) -> Iterator[None]:
    """Freeze the parameters (no gradient of theirs is needed) and set the mode; put every flag back afterwards.

    In ``train`` the modes stay as they are, so that what the user froze in eval mode stays frozen.
    """
    training = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        if mode == "eval":
            model.eval()
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag
