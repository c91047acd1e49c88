"""From an architecture's name to a network that takes images in [0, 1]."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from at_smooth import registry
from at_smooth.checkpoint import fitting, refuse_other_kinds
from at_smooth.contracts import learning_network_of
from at_smooth.exceptions import CheckpointError, OptionError
from at_smooth.modes import kept_modes
from at_smooth.normalize import Normalize
from at_smooth.plugin_errors import blamed
from at_smooth.runtime import fenced_randomness

if TYPE_CHECKING:
    from at_smooth.recipe import Recipe


def try_out(
    model: nn.Module, images: Tensor, num_classes: int, hint: str = "", attacked: bool = False, name: str = "the model"
) -> None:
    """Refuse a model whose output is not one logit a class, before it costs anything; it stays as it is.

    Args:
        model: What to try.
        images: A few, (N, C, H, W), on the model's device.
        num_classes: K.
        hint: What to say besides.
        attacked: Whether its images need a gradient.
        name: What the model is called in messages.

    Raises:
        OptionError: The model fails, its output is no tensor of shape (N, K), it gives probabilities, or no gradient
            reaches the images.
    """
    own = images.clone().requires_grad_(attacked)
    try:
        with kept_modes(model), torch.enable_grad():  # so that the output knows what made it
            logits = model.eval()(own.clone())
    except Exception as error:  # anyone's code
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"{name} fails on images {tuple(images.shape)} ({reason}). {hint}".strip()) from error
    expected = (len(images), num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(
            f"on images {tuple(images.shape)} {name} gives {found}; it should give logits {expected}. {hint}".strip()
        )
    refuse_probabilities(logits)
    if attacked and not _is_connected(logits, own):
        raise OptionError(
            f"{name} gives logits from which no gradient reaches the images, so they cannot be attacked. Look in its "
            f"forward for detach(), no_grad(), a comparison, a cast to integers or NumPy. {hint}".strip()
        )


def refuse_probabilities(logits: Tensor) -> None:
    """Refuse what comes straight out of a sigmoid or a softmax, whose gradients vanish where a model is sure.

    Args:
        logits: (N, K), made with gradients.

    Raises:
        OptionError: They are probabilities.
    """
    made_by = logits.grad_fn.name() if logits.grad_fn is not None else ""
    for function in ("Sigmoid", "Hardsigmoid", "Softmax"):
        if made_by.startswith(function):
            raise OptionError(
                f"the model gives probabilities; attacks need its logits. Leave its last {function.lower()} out."
            )


def _is_connected(logits: Tensor, images: Tensor) -> bool:
    """Whether autograd leads from logits to images."""
    if not logits.requires_grad:
        return False
    try:
        [gradient] = torch.autograd.grad(logits.sum(), images, allow_unused=True)
    except RuntimeError:  # a layer that has no gradient in eval mode, perhaps
        return True
    return gradient is not None


def build_network(
    recipe: Recipe, shape: tuple[int, int, int], num_classes: int, statistics: tuple[list[float], list[float]]
) -> nn.Module:
    """The recipe's architecture with its initial weights, normalisation in front.

    The weights follow from the recipe's seed alone; the global generators stay as they were.

    Args:
        recipe: Names the model and its options.
        shape: (C, H, W).
        num_classes: K.
        statistics: Mean and standard deviation by channel.
    """
    with fenced_randomness(recipe.seed, "weights"):
        architecture = registry.build("models", recipe.model, recipe.model_options)
        with blamed(architecture, "build"):
            try:
                built: object = architecture.build(shape, num_classes)
            except (MemoryError, OverflowError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not re.search("memory|alloc|overflow", str(error)):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "not enough memory"
                raise OptionError(f"model {recipe.model}: too large with {recipe.model_options} ({reason}).") from None
        network = learning_network_of(architecture, built)
    return nn.Sequential(OrderedDict(normalize=Normalize(*statistics), network=network))


def network_from(checkpoint: dict[str, Any], recipe: Recipe, weights: dict[str, Tensor], source: Path) -> nn.Module:
    """The network of a checkpoint, with the given weights, in eval mode.

    Raises:
        CheckpointError: The weights do not fit the architecture that the checkpoint names.
    """
    with fitting(source):
        (channels, height, width), num_classes = checkpoint["shape"], checkpoint["num_classes"]
        if not all(type(size) is int and size > 0 for size in (channels, height, width, num_classes)):
            raise ValueError(f"images of {checkpoint['shape']}, {num_classes} classes")
        blank = ([0.0] * channels, [1.0] * channels)  # the true statistics are buffers among the weights
        network = build_network(recipe, (channels, height, width), num_classes, blank)
        refuse_other_kinds(network.state_dict(), weights)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{source} does not fit the model '{recipe.model}': {error}") from None
    return network.eval()
