"""The options of commands that make a recipe, and the fields that they set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from at_smooth.commands.options import PATH, pairs_of

_F = TypeVar("_F", bound=Callable[..., Any])

PLUGIN_OPTIONS = {
    "D": ("dataset", "the data set"),
    "N": ("model", "the model (network)"),
    "M": ("method", "the method"),
    "A": ("attack", "the attack (steps, step_size, random_start, mode)"),
    "R": ("regularizer", "the regularizer"),
    "S": ("smoother", "the smoother"),
}


def recipe_options(command: _F) -> _F:
    """The options of ``train`` that are fields of a recipe; None where not given."""
    options = [
        click.option("--dataset", help="Data set (see 'at-smooth plugins datasets'). [default: digits]"),
        click.option("--data-dir", type=PATH, help="Where the data set's files are."),
        click.option("--model", help="Architecture (see 'at-smooth plugins models'). [default: the data set's]"),
        click.option("--method", help="Training method (see 'at-smooth plugins methods'). [default: at]"),
        click.option("--attack", help="Attack to train on. [default: pgd]"),
        click.option("--norm", type=click.Choice(["Linf", "L2"]), help="Norm of the threat. [default: Linf]"),
        click.option("--eps", help="Radius of the threat in [0, 1] pixels, such as 8/255. [default: the data set's]"),
        click.option("--regularizer", help="What smooths the logits (see 'at-smooth plugins regularizers')."),
        click.option("--smoother", help="What smooths the weights (see 'at-smooth plugins smoothers')."),
        click.option("--epochs", type=int, help="Passes over the training set."),
        click.option("--batch-size", type=int, help="Images in a step."),
        click.option("--accumulate", type=int, metavar="N",
                     help="Work on a batch in N pieces, one after the other, where memory is short. [default: 1]"),
        click.option("--lr", type=float, help="Learning rate at the start."),
        click.option("--seed", type=int, help="Decides split, order, initial weights and noise. [default: 0]"),
        click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]"),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of training."),
        click.option("--compile/--no-compile", default=None, help="Compile the model; pays for large networks."),
        click.option("--deterministic/--no-deterministic", default=None, help="On a GPU: the same bits every time."),
        click.option("--on-divergence", type=click.Choice(["stop", "retry"]),
                     help="Stop, or begin the epoch again with half the learning rate. [default: stop]"),
        click.option("--keep-checkpoints", metavar="every=N", help="Keep a snapshot of the weights every N epochs."),
        click.option("--validate-every", type=int, help="Epochs between measurements on the validation set."),
        click.option("--test-every", type=int, help="Epochs between measurements on the test set; 0 for never."),
        *(
            click.option(f"-{letter}", f"{field}_options", metavar="KEY=VALUE", multiple=True,
                         help=f"Option of {words}.")
            for letter, (field, words) in PLUGIN_OPTIONS.items()
        ),
        click.option("--set", "others", metavar="KEY=VALUE", multiple=True,
                     help="Any other field of the recipe, such as milestones=[50,150]."),
        click.option("--recipe", "recipe_name", metavar="FILE|NAME",
                     help="Recipe to start from: a file, a preset (paper, official-code) or a table's row "
                     "(table-1/cifar10/kd-swa)."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def changes_from(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that the command line names."""
    fields = {field: value for field, value in given.items() if value is not None}
    for name in ("others", "recipe_name"):
        fields.pop(name, None)
    for field, _ in PLUGIN_OPTIONS.values():
        pairs = fields.pop(f"{field}_options", ())
        if pairs:
            fields[f"{field}_options"] = pairs_of(pairs)
    return {**pairs_of(given["others"]), **fields}
