"""What a plugin is: the interfaces of the core.

The base classes are the neutral choice already: a bare :class:`Regularizer` leaves the loss as it is, a bare
:class:`WeightSmoother` smooths nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from at_smooth.attacks import AttackSpec
from at_smooth.exceptions import OptionError, explain
from at_smooth.threat import Threat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from at_smooth.run import Run

#: Weighted scalars, by name; the training loss is their sum.
Terms = dict[str, Tensor]

_P = TypeVar("_P", bound="Plugin")


class Plugin(BaseModel):
    """Something with options. Each public field is one: its type, default, bounds and help, declared once.

    The Python constructor, a recipe and the command line (``-R temperature=3``) all go through that declaration.
    What a plugin learns later (teachers, averages) it keeps in attributes whose names begin with an underscore.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    @classmethod
    def build_from(cls: type[_P], options: Mapping[str, Any], subject: str) -> _P:
        """Validate options and make the plugin.

        Args:
            options: Values by name, as text or typed.
            subject: Named in the message when one does not fit.

        Raises:
            OptionError: An option is unknown, of the wrong type or out of bounds.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            problem = explain(error, subject)
            known = ", ".join(cls.model_fields) or "none"
            raise type(problem)(f"{problem}. Options: {known}.") from None

    def options(self) -> dict[str, Any]:
        """Every option with its value, in plain types (what a recipe records)."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Batch:
    """Some examples, on the device.

    Attributes:
        clean: Images, (N, C, H, W) in [0, 1].
        labels: Classes, (N,) int64.
        indices: Position of each example in the training set, (N,) int64.
        whole: How many examples the batch has of which these are this rank's share; None where they are all of it.
    """

    clean: Tensor
    labels: Tensor
    indices: Tensor
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pieces(self, count: int) -> list[Batch]:
        """As many parts of nearly one size, of two examples at least, since BatchNorm needs two."""
        count = max(1, min(count, len(self) // 2))
        parts = zip(*(torch.tensor_split(each, count) for each in (self.clean, self.labels, self.indices)), strict=True)
        return [Batch(*part) for part in parts] if count > 1 else [self]


@dataclass(frozen=True)
class Step:
    """What a regularizer may look at in one training step.

    Attributes:
        clean: Images, (N, C, H, W) in [0, 1].
        perturbed: The attacked images, likewise; the clean batch itself where the method attacks nothing.
        labels: Classes, (N,).
        indices: Position of each example in the training set, (N,), for remedies that remember examples.
        logits: The student's on ``perturbed``, (N, K), with gradient.
        loss: The method's own loss on this regularizer's targets, a scalar with gradient.
        progress: 0 at the start of training, 1 at its end.
    """

    clean: Tensor
    perturbed: Tensor
    labels: Tensor
    indices: Tensor
    logits: Tensor
    loss: Tensor
    progress: float


@dataclass(frozen=True)
class Schedule:
    """The shape of a training run, for smoothers that start at a moment of it.

    Attributes:
        epochs: How many there are.
        steps_per_epoch: Updates in each.
        first_decay: How many epochs run before the learning rate first drops; None where it never drops at once.
    """

    epochs: int
    steps_per_epoch: int
    first_decay: int | None


class Teachers(Protocol):
    """Where a regularizer gets its teachers from."""

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A frozen copy of the student's architecture, trained by ``method``, in eval mode on the student's device.

        Args:
            method: Name of the method that trained it, as in ``"at"``.
            path: A run directory or checkpoint to take it from; None finds or trains one.
            **changes: Where its recipe differs from the student's otherwise, as in ``attack="fgsm"``.
        """
        ...  # pragma: no cover


class Method(Plugin):
    """Which attack to train on, and how its loss is formed."""

    def attack(self, wanted: AttackSpec) -> AttackSpec | None:
        """The attack to train on: the one that the user wants, a changed one, or None for clean training."""
        return wanted

    @abstractmethod
    def loss(self, model: nn.Module, clean: Tensor, perturbed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The method's loss.

        Args:
            model: The student, in training mode.
            clean: (N, C, H, W) in [0, 1].
            perturbed: Likewise; the clean batch itself where :meth:`attack` gave None.
            targets: Classes (N,), or probabilities (N, K).

        Returns:
            The loss, a scalar, and the logits on ``perturbed``, (N, K).
        """


class Regularizer(Plugin):
    """Smooths the logits. As it stands it changes nothing.

    Attributes:
        same_on_all_ranks: Whether what it remembers (:meth:`state`) is the same on every rank of a training, though
            each sees its own share of a batch. Where not, a training of several ranks refuses one that remembers.
    """

    same_on_all_ranks: ClassVar[bool] = False

    def setup(self, teachers: Teachers) -> None:
        """Called once, before training; the place to ask for teachers."""

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """What the method's loss compares with: classes (N,), or probabilities (N, K)."""
        return labels

    def terms(self, step: Step) -> Terms:
        """The weighted terms whose sum is the training loss."""
        return {"method": step.loss}

    def state(self) -> dict[str, Any]:
        """What it remembers of the training, as tensors and plain values; teachers do not belong here."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` gave; called after :meth:`setup`."""


class WeightSmoother(Plugin):
    """Smooths the weights. As it stands it smooths nothing.

    Epochs count from 0 here.

    Attributes:
        reads_statistics: Whether it looks at the average's BatchNorm statistics itself, as one does whose training goes
            on from the average. Where not, the core refreshes them only when the average is about to be measured.
    """

    reads_statistics: ClassVar[bool] = True

    def attach(self, model: nn.Module, schedule: Schedule) -> None:
        """Called once, before training, with the model on its device."""

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called before each epoch; may change the model's weights."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each update; ``step`` counts from 0 over the whole training."""

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Called after each epoch; says whether the average moved, so that its BatchNorm statistics are refreshed."""
        return False

    def smoothed(self) -> nn.Module | None:
        """The averaged model, or None while there is none."""
        return None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`restore` continues exactly."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` gave; called after :meth:`attach`."""


@dataclass(frozen=True)
class Task:
    """What an evaluator works on.

    Attributes:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K); a copy, in eval mode, frozen, float32.
        threat: What the adversary may do.
        num_classes: K.
        seed: For libraries that want one; torch's global generators are seeded already.
        note: Keeps a line for whoever reads the result, such as a library's warning.
    """

    model: nn.Module
    threat: Threat
    num_classes: int
    seed: int
    note: Callable[[str], None]


@dataclass
class Outcome:
    """What one evaluator did to N examples.

    Attributes:
        stages: The names of its stages, in order.
        broken_by: Which stage broke each example, (N,) int64, on the CPU; -1 where it stands.
        distances: L2 length of the perturbation that broke it, in [0, 1] pixel units, (N,); inf where it stands.
        seconds: How long the attacks took.
        notes: What the evaluator had to say.
        figures: What it measured besides.
    """

    stages: list[str]
    broken_by: Tensor
    distances: Tensor
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def standing(self) -> Tensor:
        """Which examples the model still gets right, (N,) bool."""
        return self.broken_by < 0

    @property
    def accuracy(self) -> float:
        """Their share, in percent."""
        return percent(self.standing)

    @property
    def broke(self) -> dict[str, int]:
        """How many examples each stage broke that no stage before it had."""
        return {stage: int((self.broken_by == number).sum()) for number, stage in enumerate(self.stages)}


class Evaluator(Plugin):
    """Says which examples a model still gets right.

    It attacks in one stage or several (restarts, targets, different attacks). A stage gets the examples that the
    stages before it left standing, in batches, each on a stream of randomness of its own. The core judges what comes
    back, remembers what is done, and carries on after an interruption; an evaluator only perturbs.
    """

    #: Whether its perturbations keep to the threat's radius, so that it counts in the worst case over evaluators.
    bounded: ClassVar[bool] = True

    def check(self, threat: Threat, num_classes: int) -> None:
        """Refuse what it cannot work on, before anything costs time.

        Raises:
            OptionError: It cannot attack under this threat, or with so many classes.
        """
        if threat.eps == 0:
            raise OptionError("eps is 0, so there is nothing to attack. Give --eps, or evaluate with clean alone.")

    def stages(self, task: Task) -> list[str]:
        """The names of its stages, in order."""
        return ["attack"]

    @abstractmethod
    def perturb(self, task: Task, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        """One stage of the attack on one batch.

        Args:
            task: Model and threat.
            stage: One of :meth:`stages`.
            images: (N, C, H, W), float32 in [0, 1], on the model's device.
            labels: True classes, (N,).

        Returns:
            Images of the same shape. Where ``bounded``, only those within the threat's radius count.
        """

    def fingerprint(self) -> str:
        """What its results depend on besides its options, such as a file's content; asked for after :meth:`check`.

        An interrupted evaluation carries on only where this is the same.
        """
        return ""

    def figures(self, task: Task, outcome: Outcome) -> dict[str, Any]:
        """What to report beside the accuracy, in plain types, once all stages are done."""
        return {}


@dataclass(frozen=True)
class Study:
    """What an analysis found.

    Attributes:
        figure: What it drew.
        tables: The numbers behind the figure, by name: rows of plain values, each row with the same keys.
    """

    figure: Figure
    tables: Mapping[str, list[dict[str, Any]]]


class Analysis(Plugin):
    """Draws a figure from finished runs, and gives the numbers behind it."""

    @abstractmethod
    def study(self, runs: Sequence[Run]) -> Study:
        """Look at runs.

        Args:
            runs: At least one; each has its recipe, its history and its checkpoints.

        Raises:
            InputError: It needs more of them, or other ones; the message says which.
        """


@dataclass(frozen=True)
class Images:
    """A labelled set of images, in memory.

    Attributes:
        train: Training images, (N, C, H, W), uint8, or float in [0, 1].
        train_labels: (N,) int64.
        test: Test images, likewise.
        test_labels: (M,) int64.
        num_classes: How many classes there are.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for name in ("train", "train_labels", "test", "test_labels"):
            value = torch.as_tensor(getattr(self, name))  # NumPy arrays are welcome
            whole = name.endswith("labels") and not value.is_floating_point()
            object.__setattr__(self, name, value.long() if whole else value)


@dataclass(frozen=True)
class Size:
    """How large a published data set is, known before it is there.

    Attributes:
        shape: (C, H, W).
        train: Training images, those for validation among them.
        test: Test images.
        num_classes: K.
    """

    shape: tuple[int, int, int]
    train: int
    test: int
    num_classes: int


class Dataset(Plugin):
    """Reads a set of images, and says how training augments them."""

    #: How large it is, where that is known before it is read; forecasts use it.
    published: ClassVar[Size | None] = None

    #: What a recipe on this data set starts from, before the user's own choices.
    recipe: ClassVar[Mapping[str, Any]] = {}
    #: The usual radius of the threat on this data set, by norm.
    radii: ClassVar[Mapping[str, str]] = {"Linf": "8/255", "L2": "128/255"}

    crop: int = Field(default=0, ge=0, description="random crop after zero-padding by this many pixels on each side")
    flip: bool = Field(default=False, description="random horizontal flip")
    rotation: float = Field(default=0.0, ge=0, le=180, description="random rotation by up to this many degrees")

    @abstractmethod
    def load(self, data_dir: Path | None) -> Images:
        """Read the images.

        Args:
            data_dir: Where the user says that the files are; None for the data set's own place.

        Raises:
            DataError: Files are missing or hold what they must not; the message says which files go where.
        """


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


def percent(which: Tensor) -> float:
    """The share that is true, (N,) bool, in percent."""
    return 100 * int(which.sum()) / len(which)


def total(terms: Terms) -> Tensor:
    """The training loss: the sum of its terms, a scalar."""
    return torch.stack(list(terms.values())).sum()
