"""What an engine's state consists of, checked when it comes from a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from at_smooth.measuring import COLUMNS, check_figure


def _scalar(tensor: Tensor) -> Tensor:
    if tensor.shape != ():
        raise ValueError(f"a single number is wanted, not {tuple(tensor.shape)}")
    return tensor


def _whole(row: dict[str, float | int | None]) -> dict[str, float | int | None]:
    if list(row) != COLUMNS or not isinstance(row["epoch"], int):
        raise ValueError("a number for each column of metrics.csv is wanted")
    for name, value in row.items():
        check_figure(name, value)
    return row


_Scalar = Annotated[Tensor, AfterValidator(_scalar)]
_Row = Annotated[dict[str, float | int | None], AfterValidator(_whole)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class UnderwayState(_Strict):
    """An epoch in hand, as :class:`at_smooth.underway.Underway` has it."""

    epoch: NonNegativeInt
    lr: float
    loss: _Scalar
    correct: _Scalar
    batches: NonNegativeInt
    seconds: float


class BestState(_Strict):
    """The best epoch so far of one kind of weights; no row where there is none yet."""

    score: float
    row: Annotated[dict[str, float | int | None], AfterValidator(lambda row: row and _whole(row))]


class State(_Strict):
    """What :meth:`at_smooth.engine.Engine.state` gives. What is a plugin's or torch's own is theirs to check."""

    epoch: NonNegativeInt
    step: NonNegativeInt
    retries: NonNegativeInt
    underway: UnderwayState | None
    stale: bool
    way_back: State | None
    model: dict[str, Any]
    optimizer: dict[str, Any]
    lr: dict[str, Any]
    method: dict[str, Any]
    regularizer: dict[str, Any]
    smoother: dict[str, Any]
    elsewhere: dict[Literal["method", "regularizer", "smoother"], list[bool]]
    history: list[_Row]
    best: dict[Literal["raw", "smoothed"], BestState]


def check(state: Any) -> None:
    """Refuse a state whose parts are not of the kinds that they should be.

    Raises:
        ValueError: One is not; the message says which, and what is wrong with the first.
    """
    try:
        State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the state"
        raise ValueError(f"{place}: {first['msg']}") from None
