"""What a run's files should hold, as schemas: fields that are read again, with their types and bounds.

Others may be there beside them: a plugin's own figures, or what another version of at-smooth writes down.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from at_smooth.threat import Norm, Pixels

Percent = Annotated[float, Field(ge=0, le=100)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[Finite, Field(ge=0)]
Epoch = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Radius = Annotated[Pixels, Field(ge=0, allow_inf_nan=False)]
Options = dict[str, JsonValue]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class RecordedRecipe(_Record):
    """``recipe.yaml`` of a run, and the recipe in other files, whether or not its plugins are installed here."""

    __pydantic_extra__: dict[str, JsonValue]

    dataset: str
    dataset_options: Options = {}
    model: str
    model_options: Options = {}
    method: str
    method_options: Options = {}
    attack: str = "pgd"
    attack_options: Options = {}
    norm: Norm = "Linf"
    eps: Radius = 0.0
    regularizer: str
    regularizer_options: Options = {}
    smoother: str
    smoother_options: Options = {}
    epochs: Epoch
    lr_schedule: str = "multistep"
    milestones: list[Finite] = []
    seed: Count = 0


class _Best(_Record):
    epoch: Epoch
    val_ra: Percent | None
    test_ra: Percent | None
    test_sa: Percent | None


class _Final(_Record):
    epoch: Epoch
    test_ra: Percent | None
    test_sa: Percent | None
    last5_ra_mean: Percent | None
    last5_ra_sd: Percent | None


class _Diff(_Record):
    ra: Finite | None
    sa: Finite | None


class _Block(_Record):
    best: _Best
    final: _Final
    diff: _Diff


class Summary(_Record):
    """``summary.json``; see :func:`at_smooth.run.summarize`."""

    raw: _Block
    smoothed: _Block | None
    reported: Literal["raw", "smoothed"]
    recipe: RecordedRecipe
    examples: dict[str, Count] | None = None
    test_set: str | None = None

    @model_validator(mode="after")
    def _reports_what_it_has(self) -> Summary:
        if self.reported == "smoothed" and self.smoothed is None:
            raise ValueError("it reports smoothed weights and has none")
        return self


class Environment(_Record):
    """``environment.json``; see :func:`at_smooth.run.environment`."""

    versions: dict[str, str] = {}
    packages: dict[str, str | None] = {}
    command: list[str] = []
    resumed: list[dict[str, Any]] = []


class _Threat(_Record):
    norm: Norm
    eps: Radius


class _Report(_Record):
    n: Annotated[Count, Field(ge=1)]
    threat: _Threat
    checkpoint: str
    weights: str
    part: str
    dataset: str | None
    fingerprint: str | None = None


class _Accuracy(_Record):
    accuracy: Percent
    ci95: Annotated[list[Percent], Field(min_length=2, max_length=2)]
    evaluator: str | None = None
    version: str | None = None
    broke: dict[str, Count] | None = None


class Evaluation(_Report):
    """What ``at-smooth evaluate`` found."""

    results: dict[str, _Accuracy]


class _Verdict(_Record):
    sound: bool
    found: str


class Audit(_Report):
    """What ``at-smooth audit`` found."""

    results: dict[str, _Verdict]
