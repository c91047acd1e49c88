"""What plugins promise to return, checked when they are first called; nothing here is done in each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from at_smooth.attacks import CLEAN, AttackSpec, Clean
from at_smooth.exceptions import PluginError
from at_smooth.interfaces import (
    Analysis,
    Architecture,
    Dataset,
    Images,
    Method,
    Plugin,
    Regularizer,
    Study,
    Terms,
    WeightSmoother,
)
from at_smooth.plugin_errors import blamed, described

if TYPE_CHECKING:
    from at_smooth.run import Run

_SUM_TOLERANCE = 1e-3  # of a distribution, which may be in bfloat16


def attack_of(method: Method, wanted: AttackSpec) -> AttackSpec | Clean:
    """The attack that a method trains on.

    Raises:
        PluginError: It returned anything but an attack or :data:`CLEAN`.
    """
    with blamed(method, "attack"):
        attack: object = method.attack(wanted)
    if isinstance(attack, AttackSpec) or attack is CLEAN:
        return attack
    if attack is None:
        advice = "For clean training say 'return CLEAN', with CLEAN from at_smooth; else 'return wanted'."
    else:
        advice = "It should return an attack, such as 'wanted' itself, or CLEAN for clean training."
    raise PluginError(f"{described(method)}: attack() returned {_shown(attack)}. {advice}")


def check_targets(regularizer: Regularizer, targets: object, labels: Tensor, num_classes: int) -> None:
    """Refuse targets that are neither classes (N,) nor probabilities (N, K).

    Raises:
        PluginError: They are not.
    """
    n = len(labels)
    classes = isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == (n,)
    soft = isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == (n, num_classes)
    wanted = f"classes, ({n},) int64, or probabilities, ({n}, {num_classes}) in floating point"
    if not (isinstance(targets, Tensor) and (classes or soft)):
        raise PluginError(f"{described(regularizer)}: targets() returned {_shown(targets)}; it should return {wanted}.")
    if targets.device != labels.device:
        raise PluginError(
            f"{described(regularizer)}: targets() are on {targets.device}, and the labels on {labels.device}."
        )
    if classes and not bool(((targets >= 0) & (targets < num_classes)).all()):
        raise PluginError(
            f"{described(regularizer)}: targets() returned classes from {int(targets.min())} to {int(targets.max())}; "
            f"there are {num_classes}, from 0 on."
        )
    sums = targets.detach().double().sum(1) if soft else torch.ones(n)
    off = (sums - 1).abs()
    if not bool((off <= _SUM_TOLERANCE).all()):  # NaN too
        raise PluginError(
            f"{described(regularizer)}: targets() returned rows that sum to {float(sums[off.argmax()]):g}; as "
            f"probabilities each should sum to 1."
        )


def check_loss(method: Method, returned: object, n: int, num_classes: int, started: bool) -> None:
    """Refuse what is not a loss, a scalar with gradient, and the logits on the attacked images, (N, K).

    Args:
        method: Whose.
        returned: By ``loss``.
        n: N.
        num_classes: K.
        started: Whether updates were made already, so that what is not finite may be their doing.

    Raises:
        PluginError: It is not.
    """
    wanted = f"it should return two tensors: the loss, a scalar, and the logits on 'perturbed', ({n}, {num_classes})"
    place = f"{described(method)}: loss() returned"
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise PluginError(f"{place} {_shown(returned)}; {wanted}.")
    loss, logits = returned
    for what, value in (("the loss", loss), ("the logits", logits)):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise PluginError(f"{place} as {what} {_shown(value)}; {wanted}.")
    if loss.ndim == 2 and logits.ndim < 2:
        raise PluginError(f"{place} first {_shown(loss)}, then {_shown(logits)}; {wanted}, in this order.")
    if loss.shape != ():
        raise PluginError(f"{place} as the loss {_shown(loss)}; {wanted}. Take its mean().")
    if logits.shape != (n, num_classes):
        raise PluginError(f"{place} as the logits {_shown(logits)}; {wanted}.")
    for what, value in (("the loss", loss), ("the logits", logits)):
        if not value.requires_grad:
            raise PluginError(
                f"{place} {what} without gradient; leave out detach(), torch.no_grad() and new tensors made of numbers."
            )
    if not started and bool(logits.isfinite().all()) and not bool(loss.isfinite()):
        raise PluginError(f"{place} {loss.item()} before any update, though the logits are finite.")


def check_terms(regularizer: Regularizer, terms: object, loss: Tensor, logits: Tensor, started: bool) -> None:
    """Refuse what is not a non-empty dict of scalars, whose sum has a gradient.

    A term without one is allowed beside others: a constant, say.

    Args:
        regularizer: Whose.
        terms: What ``terms`` returned.
        loss: The method's, a scalar.
        logits: (N, K).
        started: Whether updates were made already, so that what is not finite may be their doing.

    Raises:
        PluginError: It is not.
    """
    wanted = "it should return a dict of scalar tensors, as in {'method': step.loss}"
    place = f"{described(regularizer)}: terms() returned"
    if not isinstance(terms, dict) or not terms:
        raise PluginError(f"{place} {_shown(terms)}; {wanted}.")
    for name, value in terms.items():
        if not isinstance(name, str):
            raise PluginError(f"{place} a term named {name!r}; {wanted}.")
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise PluginError(f"{place} as '{name}' {_shown(value)}; {wanted}.")
        if value.shape != ():
            raise PluginError(f"{place} as '{name}' {_shown(value)}; each term is a scalar: take its mean().")
        if value.device != logits.device:
            raise PluginError(f"{place} '{name}' on {value.device}; the logits are on {logits.device}.")
    if not any(value.requires_grad for value in terms.values()):
        raise PluginError(
            f"{place} {', '.join(map(repr, terms))} without gradient, so nothing is learned; leave out detach(), "
            f"torch.no_grad() and new tensors made of numbers."
        )
    _check_finite_terms(place, terms, loss, logits, started)


def _check_finite_terms(place: str, terms: Terms, loss: Tensor, logits: Tensor, started: bool) -> None:
    """What is not finite before any update, though it is made of what is, is the regularizer's own."""
    if started or not (bool(logits.isfinite().all()) and bool(loss.isfinite())):
        return
    for name, value in terms.items():
        if not bool(value.isfinite()):
            raise PluginError(
                f"{place} as '{name}' {value.item()} before any update, though logits and loss are finite. Look at its "
                f"formula and options: a log of 0, say."
            )


def check_gradients(method: Method, regularizer: Regularizer, learning: list[nn.Parameter]) -> None:
    """Refuse a loss that no parameter of the student learns from.

    Raises:
        PluginError: None has a gradient after the backward pass.
    """
    if all(parameter.grad is None for parameter in learning):
        raise PluginError(
            f"{described(method)}, {described(regularizer)}: the gradient of their loss reaches no parameter of the "
            f"model. loss() should call the model that it is given, and terms() use step.loss or step.logits."
        )


@contextmanager
def settings_kept(plugin: Plugin, method: str, model: nn.Module) -> Iterator[None]:
    """Refuse a method that leaves modules in another mode, or parameters otherwise frozen, than it found them.

    Raises:
        PluginError: It does.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    yield
    for name, module in model.named_modules():
        if module.training != modes.get(name, module.training):
            mode, wanted = ("train", "train(False)") if module.training else ("eval", "train()")
            raise PluginError(
                f"{described(plugin)}: {method}() left {_part(name)} in {mode} mode, which changes its BatchNorm and "
                f"dropout from then on. Call {wanted} on it before you return, or use a copy.deepcopy of the model."
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != learning.get(name, parameter.requires_grad):
            raise PluginError(
                f"{described(plugin)}: {method}() left requires_grad of the model's {name} "
                f"{parameter.requires_grad}; put it back before you return, or use a copy.deepcopy of the model."
            )


def check_moved(smoother: WeightSmoother, moved: object) -> bool:
    """What ``after_epoch`` says.

    Raises:
        PluginError: It is no bool.
    """
    if not isinstance(moved, bool | np.bool_):
        raise PluginError(
            f"{described(smoother)}: after_epoch() returned {_shown(moved)}; it should return True where the average "
            f"moved, so that its BatchNorm statistics are refreshed, and else False."
        )
    return bool(moved)


def check_smoothed(smoother: WeightSmoother, smoothed: object, student: nn.Module) -> None:
    """Refuse an average that is no module of its own, of the student's architecture and in eval mode.

    Raises:
        PluginError: It is not.
    """
    place, wanted = f"{described(smoother)}: smoothed() returned", "it should return a module of its own, or None"
    advice = "Make it by copy.deepcopy of the model, and load the averaged weights into it."
    if not isinstance(smoothed, nn.Module):
        raise PluginError(f"{place} {_shown(smoothed)}; {wanted}. {advice}")
    own, students = smoothed.state_dict(), student.state_dict()
    if _places(own) & _places(students):
        raise PluginError(f"{place} the model that is trained, or tensors that it shares with it; {wanted}. {advice}")
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in students.items()}:
        averaged = " Of an AveragedModel return its .module." if "n_averaged" in own else ""
        raise PluginError(f"{place} a module whose tensors have other names or shapes than the model's.{averaged}")
    training = next((name for name, module in smoothed.named_modules() if module.training), None)
    if training is not None:
        part = f" (its part '{training}')" if training else ""
        raise PluginError(f"{place} a model in train mode{part}. Call eval() on it where you make it.")


def _places(tensors: Mapping[str, Tensor]) -> set[int]:
    """Where they lie in memory."""
    return {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}


def loaded(dataset: Dataset, data_dir: Path | None) -> Images:
    """The images of a data set.

    Raises:
        PluginError: ``load`` fails, or returned anything else.
        DataError: Files are missing or hold what they must not.
    """
    with blamed(dataset, "load"):
        images: object = dataset.load(data_dir)
    if not isinstance(images, Images):
        raise PluginError(
            f"{described(dataset)}: load() returned {_shown(images)}; it should return at_smooth.Images(train, "
            f"train_labels, test, test_labels, num_classes)."
        )
    return images


def studied(analysis: Analysis, runs: Sequence[Run]) -> Study:
    """What an analysis finds.

    Raises:
        PluginError: ``study`` fails, or returned anything else.
        InputError: It needs other runs.
    """
    with blamed(analysis, "study"):
        study: object = analysis.study(runs)
    if not isinstance(study, Study):
        raise PluginError(
            f"{described(analysis)}: study() returned {_shown(study)}; it should return a figure and its tables, "
            f"at_smooth.Study(figure, tables)."
        )
    return study


def network_of(architecture: Architecture, built: object) -> nn.Module:
    """What ``build`` returned.

    Raises:
        PluginError: It is no module.
    """
    place, wanted = f"{described(architecture)}: build() returned", "it should return a network, a torch.nn.Module"
    if isinstance(built, type):
        raise PluginError(f"{place} the class {built.__name__}; {wanted}. Call the class.")
    if not isinstance(built, nn.Module):
        raise PluginError(f"{place} {_shown(built)}; {wanted}.")
    return built


def learning_network_of(architecture: Architecture, built: object) -> nn.Module:
    """The same, where it is to be trained.

    Raises:
        PluginError: It is no module, or none of its parameters learns.
    """
    network = network_of(architecture, built)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise PluginError(
            f"{described(architecture)}: build() returned a network in which no parameter learns: requires_grad is "
            f"False for all of them."
        )
    return network


def _part(name: str) -> str:
    return f"its module '{name}'" if name else "the model"


def _shown(value: object) -> str:
    """A value, briefly: the shape and the type of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str) or value == {}:
        return repr(value)[:80]
    return f"{_article(type(value).__name__)}"


def _article(word: str) -> str:
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
