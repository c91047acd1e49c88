"""How long and how fast to train, and what to measure on the way."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Settings(BaseModel):
    """How long and how fast to train, and what to measure on the way. The defaults are the paper's (section 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    epochs: int = Field(default=200, ge=1, description="passes over the training set")
    batch_size: int = Field(default=128, ge=2, description="images in a step")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="pieces that a batch is worked on in, one after the other, where memory is short; BatchNorm then "
        "sees pieces",
    )
    lr: float = Field(default=0.1, gt=0, description="learning rate at the start")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay of SGD")
    lr_schedule: Literal["multistep", "cosine"] = Field(default="multistep", description="how the learning rate falls")
    milestones: tuple[float, ...] = Field(
        default=(0.25, 0.75),
        description="where it drops to a tenth: shares of the training below 1, or epochs from 1 up",
    )
    on_divergence: Literal["stop", "retry"] = Field(
        default="stop",
        description="what to do where something is not finite: stop, or begin the epoch again with half the learning "
        "rate, three times at most",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="decides split, order, initial weights and noise")
    eval_steps: int = Field(default=20, ge=0, description="steps of the PGD attack that measures RA")
    validate_every: int = Field(default=1, ge=1, description="epochs between measurements on the validation set")
    test_every: int = Field(
        default=1, ge=0, description="epochs between measurements on the test set (the last five always); 0 for never"
    )

    keep_checkpoints: int = Field(
        default=0, ge=0, description="epochs between snapshots of the raw weights that are kept; 0 for none"
    )

    @field_validator("keep_checkpoints", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        return value.removeprefix("every=") if isinstance(value, str) else value  # as the command line has it

    @field_validator("milestones")
    @classmethod
    def _positive_and_rising(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < milestone < float("inf") for milestone in milestones) or list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be positive and rise, not {list(milestones)}")
        return milestones

    def decays(self) -> list[int]:
        """After how many epochs the learning rate drops; empty for a schedule without drops."""
        if self.lr_schedule != "multistep":
            return []
        return [max(1, round(m * self.epochs if m < 1 else m)) for m in self.milestones]
