"""A recipe: one experiment, validated, to and from YAML."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from at_smooth import registry
from at_smooth.attacks import AttackSpec
from at_smooth.contracts import attack_of
from at_smooth.data import Split
from at_smooth.exceptions import FileError, InputError, OptionError, explain
from at_smooth.files import usable_path
from at_smooth.interfaces import Dataset
from at_smooth.reading import yaml_of
from at_smooth.settings import Settings
from at_smooth.threat import Norm, Pixels, Threat, parse_pixels
from at_smooth.trust import check, trust_code

#: The choices that are plugins: field of the recipe, and kind of plugin.
PLUGIN_FIELDS = {
    "dataset": "datasets",
    "model": "models",
    "method": "methods",
    "regularizer": "regularizers",
    "smoother": "smoothers",
}

#: Fields that shape neither the weights nor which epoch is the best.
CIRCUMSTANCES = ("data_dir", "device", "threads", "compile", "fast_layers", "keep_checkpoints", "test_every")

#: Fields that may change when a run is continued, if the user says so: what was trained stays what it is.
HARMLESS = (
    *("data_dir", "device", "threads", "compile", "fast_layers", "deterministic"),
    *("keep_checkpoints", "on_divergence"),
)

Options = dict[str, Any]


class Recipe(Settings):
    """One experiment. What is not said comes from the data set's own recipe, then from the paper's protocol.

    Once made, every field and every option of every plugin has its value, so that ``recipe.yaml`` is the whole truth.
    Code named in the fields, ``package.module:name``, is trusted and imported, unless they come out of a file.

    Args:
        file: The file that the fields were read from; None where the user gives them.
        fields: The fields, by name.

    Raises:
        UntrustedError: The file names code that the user has not trusted.
        PluginError: A plugin is unknown, ambiguous or broken.
        OptionError: A field or an option is unknown, of the wrong type or out of bounds.
    """

    dataset: str = Field(default="digits", description="where the images come from")
    data_dir: Path | None = Field(default=None, description="where the data set's files are")
    dataset_options: Options = Field(default_factory=dict)
    model: str = Field(description="the architecture")
    model_options: Options = Field(default_factory=dict)
    method: str = Field(default="at", description="which attack to train on, and how its loss is formed")
    method_options: Options = Field(default_factory=dict)
    attack: str = Field(default="pgd", description="the attack to train on")
    attack_options: Options = Field(default_factory=dict)
    norm: Norm = Field(default="Linf", description="how the size of a perturbation is measured")
    eps: Pixels = Field(ge=0, description="radius of the threat, in [0, 1] pixel units, such as 8/255")
    regularizer: str = Field(default="none", description="what smooths the logits")
    regularizer_options: Options = Field(default_factory=dict)
    smoother: str = Field(default="none", description="what smooths the weights")
    smoother_options: Options = Field(default_factory=dict)
    validation: float = Field(default=0.1, gt=0, lt=1, description="share of the training set held out")
    split: Split = Field(
        default="stratified",
        description="which share: stratified by class, the last images, or the end of a permutation",
    )
    split_seed: int | None = Field(default=None, ge=0, lt=2**32, description="decides the split; default: the seed")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="arithmetic of training")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads; default: torch's, one a core")
    compile: bool = Field(default=False, description="compile the model; pays for large networks")
    fast_layers: bool = Field(
        default=True,
        description="in float32 on a CPU attack layers in faster forms, equal up to rounding: BatchNorm in eval mode "
        "as an affine map or within the layer before it; on Intel's processors Winograd's convolution, of teachers too",
    )
    deterministic: bool = Field(
        default=False,
        description="let a GPU use only algorithms that give the same bits every time, which is slower; a CPU does so "
        "anyhow",
    )

    def __init__(self, file: Path | None = None, /, **fields: Any) -> None:
        if file is None:
            trust_code(plugins_in(fields).values())
        else:
            check(plugins_in(fields), file)
        try:
            super().__init__(**_with_dataset_defaults(fields))
        except ValidationError as error:
            raise explain(error, "recipe") from None

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, data_dir: Path | None) -> Path | None:
        return absolute(data_dir) if data_dir else None  # a recipe works from any folder

    @field_validator("eps")
    @classmethod
    def _finite(cls, eps: float) -> float:
        if not eps < float("inf"):
            raise ValueError(f"{eps} is not a finite number")
        return eps

    @model_validator(mode="after")
    def _resolve_options(self) -> Recipe:
        for field, kind in PLUGIN_FIELDS.items():
            plugin = registry.build(kind, getattr(self, field), getattr(self, f"{field}_options"))
            self.__dict__[f"{field}_options"] = plugin.options()
        self.__dict__["attack_options"] = self.attack_spec.options()
        attack_of(self.plugin("method"), self.attack_spec)  # refuses an attack that it cannot train on
        return self

    @property
    def threat(self) -> Threat:
        """What the adversary may do."""
        return Threat(self.norm, self.eps)

    @property
    def attack_spec(self) -> AttackSpec:
        """The attack that the user wants."""
        return AttackSpec.parse(self.attack, self.threat, self.attack_options)

    def plugin(self, field: str) -> Any:
        """The plugin that a field names, with its options."""
        return registry.build(PLUGIN_FIELDS[field], getattr(self, field), getattr(self, f"{field}_options"))

    def replacing(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed; a plugin newly named starts from its own defaults."""
        return Recipe(**merge(self.model_dump(), changes))

    def differences(self, other: Recipe, ignoring: Collection[str] = ()) -> dict[str, str]:
        """The fields in which another recipe differs, each with its values in words."""
        before, now = self.to_dict(), other.to_dict()
        changed = [field for field in now if before[field] != now[field] and field not in ignoring]
        return {field: f"{field} was {before[field]}, is now {now[field]}" for field in changed}

    def to_dict(self) -> dict[str, Any]:
        """Every field in plain types, what is trained before how."""
        fields = self.model_dump(mode="json")
        how = {name: fields.pop(name) for name in Settings.model_fields}
        return {**fields, **how}

    def to_yaml(self) -> str:
        """The recipe as text, to read again with :meth:`from_yaml`."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, path: Path, changes: Mapping[str, Any] | None = None, *, trust: Iterable[str] = ()) -> Recipe:
        """Read a recipe; it may leave fields out.

        Args:
            path: The file.
            changes: Fields that override the file's.
            trust: Code that the file may name, ``package.module:name`` each.

        Raises:
            UntrustedError: The file names code that the user has not trusted.
            InputError: The file is missing or no recipe.
        """
        changes = changes or {}
        trust_code([*trust, *plugins_in(changes).values()])
        return cls(path, **merge(read_yaml(path), changes))


def plugins_in(fields: Mapping[str, Any]) -> dict[str, str]:
    """The plugins that fields of a recipe name, by field."""
    return {field: name for field in PLUGIN_FIELDS if isinstance(name := fields.get(field), str)}


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, not yet validated.

    Raises:
        FileError: The file is missing, unreadable or no mapping.
    """
    content = yaml_of(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FileError(f"{path} is no recipe: it should hold 'field: value' lines.")
    return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignoring: Collection[str] = ()) -> dict[str, str]:
    """The fields and plugins' options in which two recipes in plain types differ, of those that both have.

    Args:
        before: One recipe.
        now: The other.
        ignoring: Fields that may differ.

    Returns:
        By name, the two values in words.
    """
    changed = {}
    for field in before:
        if field not in now or field in ignoring:
            continue
        one, other = before[field], now[field]
        if field.endswith("_options") and isinstance(one, dict) and isinstance(other, dict):
            inner = differences(one, other)
            changed.update({f"{field}.{name}": f"{field}.{words}" for name, words in inner.items()})
        elif not _same(other, one):
            changed[field] = f"{field} was {one}, is now {other}"
    return changed


def absolute(path: Path) -> Path:
    """A path that means the same from any folder.

    Raises:
        ValueError: It begins with ``~`` and the name of nobody, or is no path.
    """
    try:
        return usable_path(path).expanduser().absolute()
    except InputError as error:
        raise ValueError(str(error)) from None
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user") from None


#: Options that every plugin of a field has, which outlive a change of plugin.
_COMMON = {"attack": ("mode",)}

#: What follows from the radius unless it is given with it: the length of an attack's step.
_STEPS = ("step_size", "alpha")


def merge(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with changes on top.

    What followed from a field that changes is not kept: a newly named plugin does not inherit the options of the one
    that it replaces, a new norm takes its own radius, a new radius its own step.
    """
    merged = dict(fields)
    options = {field: value for field, value in changes.items() if field.endswith("_options")}
    for field, value in changes.items():
        if field in options or _same(value, merged.get(field, _default(field))):
            continue
        if f"{field}_options" in merged:
            kept = _only(merged.pop(f"{field}_options"), _COMMON.get(field, ()))
            merged.update({f"{field}_options": kept} if kept else {})
        if field == "norm":
            merged.pop("eps", None)
        if field in ("norm", "eps") and isinstance(merged.get("attack_options"), dict):
            others = [name for name in merged["attack_options"] if name not in _STEPS]
            merged["attack_options"] = _only(merged["attack_options"], others)
    merged.update({field: value for field, value in changes.items() if field not in options})
    for field, value in options.items():
        below = merged.get(field)
        merged[field] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _only(options: Any, names: Collection[str]) -> Any:
    return {name: value for name, value in options.items() if name in names} if isinstance(options, dict) else {}


def added_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The plugins' options that a recipe in plain types has and an earlier one lacks, in words, by name.

    A newer version of a plugin has more options too, so this is no difference between recipes of two versions.
    """
    return {
        f"{field}.{name}": f"{field}.{name} was not there, is now {value}"
        for field, options in now.items()
        if isinstance(options, dict) and isinstance(before.get(field), dict)
        for name, value in options.items()
        if name not in before[field]
    }


def _same(value: Any, before: Any) -> bool:
    try:
        return bool(value == before or parse_pixels(value) == parse_pixels(before))
    except ValueError:
        return False


def _default(field: str) -> Any:
    return Recipe.model_fields[field].default if field in Recipe.model_fields else None


def _with_dataset_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    name = fields.get("dataset", Recipe.model_fields["dataset"].default)
    if not isinstance(name, str):
        raise OptionError(f"recipe: dataset: give the name of a data set, not {name!r}")
    dataset = cast(type[Dataset], registry.load("datasets", name))
    defaults = dict(dataset.recipe)
    trust_code(plugins_in(defaults).values())  # named by code, which is imported already
    norm = fields.get("norm", Recipe.model_fields["norm"].default)
    defaults["eps"] = dataset.radii.get(norm, 0) if isinstance(norm, str) else 0  # pydantic words the norm's refusal
    defaults["norm"] = norm
    if "lr_schedule" not in fields and "milestones" in fields:
        defaults.pop("lr_schedule", None)
    return merge(defaults, fields)
