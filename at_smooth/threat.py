"""What the adversary may do, in [0, 1] pixel units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, PlainSerializer

from at_smooth.exceptions import OptionError

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


def too_long(norm: str, length: float, shape: tuple[int, ...] | None = None) -> str:
    """Why a radius or a step cannot be meant, in words; empty where it can be.

    Args:
        norm: How it is measured.
        length: In [0, 1] pixel units.
        shape: Of one image, (C, H, W); where it is not known, lengths in L2 have no limit.
    """
    if norm == "Linf":
        most, what = 1.0, "the range of a pixel"
    elif shape is not None:
        size = "x".join(map(str, shape))
        most, what = math.sqrt(math.prod(shape)), f"the largest L2 distance between two images of {size}"
    else:
        return ""
    if length <= most:
        return ""
    meant = f"; did you mean {length:g}/255?" if length <= 255 * most else "."
    return f"{length:g} is more than {most:.4g}, {what}{meant}"


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

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise OptionError(f"there is no norm {self.norm!r}. Norms: {', '.join(get_args(Norm))}.")
        try:
            eps = parse_pixels(self.eps)
        except ValueError as error:
            raise OptionError(f"eps: {error}") from None
        if not (isinstance(eps, int | float) and 0 <= eps < float("inf")):
            raise OptionError(f"eps {self.eps!r} is no radius; give a number from 0 up, such as 8/255.")
        object.__setattr__(self, "eps", eps)
        self.check_shape(None)

    def check_shape(self, shape: tuple[int, ...] | None) -> None:
        """Refuse a radius that is larger than any perturbation.

        Args:
            shape: Of one image, (C, H, W); without it any radius passes in L2.

        Raises:
            OptionError: It is.
        """
        reason = too_long(self.norm, self.eps, shape)
        if reason:
            raise OptionError(f"eps {reason}")

    def __str__(self) -> str:
        return f"{self.norm}, eps {format_pixels(self.eps)}"
