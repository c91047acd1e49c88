"""From a threat to an attack: torchattacks objects, bound to a model that they leave as they found it."""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from at_smooth.exceptions import OptionError, explain, nearest
from at_smooth.fast_layers import fast_layers
from at_smooth.modes import kept_modes
from at_smooth.own_input import keeps_input
from at_smooth.threat import OptionalPixels, Threat, parse_pixels, too_long

#: What an attack makes large: the cross-entropy, or the divergence from the clean prediction.
Objective = Literal["ce", "kl"]


class Clean(Enum):
    """The type of :data:`CLEAN`."""

    CLEAN = "clean"


#: What a method's ``attack`` returns to train on clean images.
CLEAN: Final = Clean.CLEAN


class AttackSpec(BaseModel):
    """One attack, not yet bound to a model. Its fields but for threat and objective are the options ``-A``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threat: Threat = Field(exclude=True)
    objective: Objective = Field(default="ce", exclude=True)
    mode: Literal["train", "eval"] = Field(
        default="train",
        description="the model's mode while it is attacked in training; in 'train', as in the paper's published "
        "code, BatchNorm uses the batch's statistics and its running ones move",
    )

    @staticmethod
    def parse(name: str, threat: Threat, options: Mapping[str, Any]) -> AttackSpec:
        """Validate a name and its options.

        Args:
            name: ``pgd``, ``fgsm``, or ``torchattacks:CLASS`` for any attack of that library.
            threat: What the adversary may do.
            options: Values by name, as text or typed.

        Raises:
            OptionError: The attack or an option is unknown, an option is out of bounds, or the attack is of another
                norm than the threat.
        """
        if name.startswith("torchattacks:"):
            return LibraryAttack.named(name.partition(":")[2], threat, options)
        if name not in _OWN:
            known = ", ".join([*_OWN, "torchattacks:CLASS"])
            raise OptionError(f"there is no attack '{name}'{nearest(name, list(_OWN))}. Attacks: {known}.")
        return _validated(_OWN[name], name, threat, options)

    @property
    def name(self) -> str:
        """What ``--attack`` calls it."""
        return next(name for name, cls in _OWN.items() if cls is type(self))

    def options(self) -> dict[str, Any]:
        """The options ``-A`` with their values, in plain types."""
        return self.model_dump(mode="json")

    def maximising(self, objective: Objective) -> AttackSpec:
        """The same attack on another objective.

        Raises:
            OptionError: The attack has its own objective.
        """
        return self.model_copy(update={"objective": objective})

    @property
    def lengths(self) -> dict[str, float]:
        """Its options that are lengths in [0, 1] pixel units, such as that of a step."""
        return {}

    @model_validator(mode="after")
    def _check_lengths(self) -> AttackSpec:
        reason = self._too_long(None)
        if reason:
            raise ValueError(reason)
        return self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a radius or a step that is longer than any perturbation.

        Args:
            shape: Of one image, (C, H, W).

        Raises:
            OptionError: One is.
        """
        self.threat.check_shape(shape)
        reason = self._too_long(shape)
        if reason:
            raise OptionError(f"attack {self.name}: {reason}")

    def _too_long(self, shape: tuple[int, ...] | None) -> str:
        reasons = {name: too_long(self.threat.norm, length, shape) for name, length in self.lengths.items()}
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)

    @property
    def views_gradients(self) -> bool:
        """Whether the library may call ``view`` on the gradient, which it cannot where that is channels_last."""
        return True

    @abstractmethod
    def build(self, model: nn.Module) -> Any:
        """The torchattacks object, bound to a model on its device."""


class PGD(AttackSpec):
    """Projected gradient descent (Madry et al., ICLR 2018), Eq. 6; Eq. 7 where the objective is the divergence."""

    _STEP_OVER_EPS: ClassVar[Mapping[str, float]] = {"Linf": 1 / 4, "L2": 15 / 128}  # 2/255 of 8/255, 15/255 of 128/255

    steps: int = Field(default=10, ge=0, description="gradient steps")
    step_size: OptionalPixels = Field(
        default=None, ge=0, description="length of a step; default eps/4 in Linf, eps*15/128 in L2 (A2.2)"
    )
    random_start: bool = Field(default=True, description="start at a random point of the ball")

    @model_validator(mode="after")
    def _usual_step(self) -> PGD:
        if self.step_size is None:
            self.__dict__["step_size"] = self.threat.eps * self._STEP_OVER_EPS[self.threat.norm]
        return self

    @property
    def lengths(self) -> dict[str, float]:
        """The step."""
        return {} if self.step_size is None else {"step_size": self.step_size}

    @property
    def views_gradients(self) -> bool:
        """In L2, to measure them; in Linf their sign is all that counts."""
        return self.threat.norm != "Linf"

    def maximising(self, objective: Objective) -> AttackSpec:
        """The same attack; on the divergence it has its own random start."""
        if objective == "kl" and not self.random_start:
            raise OptionError("the divergence has no gradient at the clean image, so -A random_start=false cannot be.")
        return super().maximising(objective)

    def build(self, model: nn.Module) -> Any:
        """``torchattacks.PGD`` or ``PGDL2``; for the divergence ``TPGD``, or our own where the library has none."""
        import torchattacks

        eps, step = self.threat.eps, self.step_size
        if self.objective == "kl":
            from at_smooth.tpgd_l2 import TPGDL2

            return {"Linf": torchattacks.TPGD, "L2": TPGDL2}[self.threat.norm](model, eps, step, self.steps)
        attack = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[self.threat.norm]
        return attack(model, eps, step, self.steps, self.random_start)


class FGSM(PGD):
    """One step of PGD from a random start, as fast adversarial training has it (Wong et al., ICLR 2020)."""

    _STEP_OVER_EPS: ClassVar[Mapping[str, float]] = {"Linf": 7 / 8, "L2": 15 / 128}  # 7/255 of 8/255, 15/255 of 128/255

    steps: int = Field(default=1, ge=1, le=1, description="one, or it would be PGD")
    step_size: OptionalPixels = Field(
        default=None, ge=0, description="length of the step; default eps*7/8 in Linf, eps*15/128 in L2 (A2.2)"
    )


class LibraryAttack(AttackSpec):
    """Any attack of torchattacks, by the name of its class; its options are the class's own."""

    model_config = ConfigDict(extra="allow")

    attack: str = Field(exclude=True)

    @classmethod
    def named(cls, attack: str, threat: Threat, options: Mapping[str, Any]) -> LibraryAttack:
        """Check the class's name, its norm and the options' names."""
        import torchattacks

        classes = {
            name: value
            for name, value in vars(torchattacks).items()
            if isinstance(value, type) and issubclass(value, torchattacks.attack.Attack)
        }
        if attack not in classes:
            raise OptionError(
                f"torchattacks has no attack '{attack}'{nearest(attack, list(classes))}. Attacks: {', '.join(classes)}."
            )
        accepted = inspect.signature(classes[attack]).parameters
        measured = re.search(r"Distance Measure : (.*)", classes[attack].__doc__ or "")
        if "norm" not in accepted and measured and threat.norm not in measured.group(1):
            raise OptionError(
                f"attack torchattacks:{attack} measures {measured.group(1).strip()}, the threat is {threat}. "
                f"Choose another --attack or --norm."
            )
        if not {"eps", "max_epsilon"} & set(accepted):
            raise OptionError(f"attack torchattacks:{attack} has no radius, so it cannot keep to a threat.")
        own = [name for name in accepted if name not in ("model", "norm", "eps", "max_epsilon")]
        unknown = [name for name in options if name not in own and name != "mode"]
        if unknown:
            raise OptionError(
                f"attack torchattacks:{attack} has no option {', '.join(unknown)}. "
                f"Options: {', '.join(['mode', *own])}."
            )
        usual = {}
        if "alpha" in own and "eps" in accepted:  # as long a step, for this radius, as the class takes for its own
            usual["alpha"] = accepted["alpha"].default * threat.eps / accepted["eps"].default
        typed = {name: _like(accepted[name].default, value, f"torchattacks:{attack}: {name}")
                 for name, value in options.items() if name in own}  # fmt: skip
        return _validated(cls, f"torchattacks:{attack}", threat, {**usual, **options, **typed}, attack=attack)

    @property
    def name(self) -> str:
        """``torchattacks:CLASS``."""
        return f"torchattacks:{self.attack}"

    @property
    def lengths(self) -> dict[str, float]:
        """Steps, as torchattacks calls them."""
        found = {name: (self.model_extra or {}).get(name) for name in _LENGTHS}
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def maximising(self, objective: Objective) -> AttackSpec:
        """Only the objective that the class has."""
        if objective != "ce":
            raise OptionError(f"torchattacks:{self.attack} has its own objective; this method needs --attack pgd.")
        return self

    def build(self, model: nn.Module) -> Any:
        """The object; options that the constructor cannot use end in an :class:`OptionError`."""
        import torchattacks

        attack = getattr(torchattacks, self.attack)
        accepted = inspect.signature(attack).parameters
        given = {"eps": self.threat.eps, "max_epsilon": self.threat.eps, "norm": self.threat.norm}
        own = {name: value for name, value in given.items() if name in accepted}
        try:
            return attack(model, **own, **(self.model_extra or {}))
        except (TypeError, ValueError) as error:
            raise OptionError(f"attack torchattacks:{self.attack}: {error}") from None


#: Options of torchattacks' classes that are lengths in pixels: of a step, and of a finite difference.
_LENGTHS = ("alpha", "delta")


def _like(default: Any, value: Any, name: str) -> Any:
    """A value as the type of a constructor's default, which is all that torchattacks says of its options."""
    kind = type(default)
    if kind not in (bool, int, float, str):
        return value
    try:
        return TypeAdapter(kind).validate_python(parse_pixels(value) if kind is float else value)
    except (ValidationError, ValueError):
        raise OptionError(f"attack {name}: give {kind.__name__}, not {value!r}.") from None


_OWN: dict[str, type[PGD]] = {"pgd": PGD, "fgsm": FGSM}
_S = TypeVar("_S", bound=AttackSpec)


def _validated(cls: type[_S], name: str, threat: Threat, options: Mapping[str, Any], **more: Any) -> _S:
    reserved = {"threat", "objective", "attack", "name"} & set(options)
    if reserved:
        raise OptionError(f"attack {name} has no option {', '.join(sorted(reserved))}.")
    try:
        return cls(threat=threat, **options, **more)
    except ValidationError as error:
        raise explain(error, f"attack {name}") from None


class Adversary:
    """An attack bound to a model.

    When a call returns, every module's mode and every parameter's ``requires_grad`` is as it was before.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K), already on its device.
        spec: The attack.
        targeted: Whether the labels that it is called with are classes to reach, not classes to leave.
        fast: Whether the layers of a model in channels_last may run in faster forms meanwhile, equal up to rounding
            (:func:`at_smooth.fast_layers.fast_layers`).

    Raises:
        OptionError: The attack cannot be built, or not targeted; or, when it is called, the radius or a step is longer
            than any perturbation of such images.
    """

    def __init__(self, model: nn.Module, spec: AttackSpec, *, targeted: bool = False, fast: bool = False) -> None:
        self.spec = spec
        self._model = model
        self._faster = fast_layers if fast else nullcontext
        self._attack = spec.build(_Shield(model, spec.views_gradients))
        if targeted:
            if "targeted" not in self._attack.supported_mode:
                raise OptionError(f"attack {spec.name} cannot aim at a class.")
            self._attack.set_mode_targeted_by_label(quiet=True)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images.

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: True classes, (N,); the classes to reach where the attack is targeted.

        Returns:
            Images within eps of the given ones, in [0, 1], detached.
        """
        if self.spec.threat.eps == 0:  # the L2 projection would divide nothing by nothing
            return images.clone()
        self.spec.check_shape(tuple(images.shape[1:]))
        own = images.clone(memory_format=torch.contiguous_format)  # a library's to spoil, as the labels are
        with attackable(self._model, self.spec.mode), self._faster(self._model):
            perturbed: Tensor = self._attack(own, labels.clone())
        return perturbed


class _Shield(nn.Module):
    """What torchattacks sees of the model: it may run it, and cannot switch its modes.

    Gradients can reach it contiguous, since its L2 attacks use ``view``, which channels_last models would break. A
    model that works in place gets a copy of the images: these are the attack's.
    """

    def __init__(self, model: nn.Module, contiguous: bool) -> None:
        super().__init__()
        self.model = model
        self._contiguous = contiguous

    def forward(self, images: Tensor) -> Tensor:
        if self._contiguous and images.requires_grad:
            images.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(images if keeps_input(self.model) else images.clone())
        return logits.float()  # under autocast the attack's loss stays in full precision

    def train(self, mode: bool = True) -> _Shield:
        return self


@contextmanager
def attackable(model: nn.Module, mode: str) -> Iterator[None]:
    """Freeze the parameters (no gradient of theirs is needed) and set the mode; put every flag back afterwards.

    In ``train`` the modes stay as they are, so that what the user froze in eval mode stays frozen.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with kept_modes(model), torch.enable_grad():
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            if mode == "eval":
                model.eval()
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
