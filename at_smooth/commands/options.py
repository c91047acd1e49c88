"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from at_smooth.exceptions import InputError, OptionError
from at_smooth.files import usable_path
from at_smooth.reading import LimitError, parse_yaml

if TYPE_CHECKING:
    from at_smooth.interfaces import Evaluator
    from at_smooth.subject import Wanted

_F = TypeVar("_F", bound=Callable[..., Any])
_Option = Callable[[_F], _F]


def _all(*options: Any) -> Callable[[_F], _F]:
    def decorate(command: _F) -> _F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class _PathType(click.Path):
    """A path that the system can be asked for; whether anything is there is for the command to see."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return usable_path(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


#: The type of every option and argument that is a path.
PATH = _PathType()

#: Which evaluators, on how many examples.
evaluator_options = _all(
    click.option("--with", "with_", metavar="NAME", multiple=True,
                 help="Evaluator (see 'at-smooth plugins evaluators'), or torchattacks:CLASS; LABEL=NAME to name its "
                 "result. [default: clean and pgd]"),
    click.option("-E", "options", metavar="NAME.KEY=VALUE", multiple=True, help="Option of an evaluator."),
)  # fmt: skip

#: Which weights of a run.
weights_options = _all(
    click.option("--weights", type=click.Choice(["reported", "raw", "smoothed"]), default="reported",
                 show_default=True, help="Which weights; the reported ones are smoothed where there are such."),
    click.option("--checkpoint", type=click.Choice(["final", "best"]), default="final", show_default=True,
                 help="Last epoch, or best by validation."),
)  # fmt: skip

#: Which model, on which images, under which threat.
subject_options = _all(
    weights_options,
    click.option("--part", type=click.Choice(["test", "val", "train"]), default="test", show_default=True,
                 help="Part of the data set."),
    click.option("--n-examples", type=int, help="So many examples, drawn by the seed, classes in proportion."),
    click.option("--norm", type=click.Choice(["Linf", "L2"]), help="Norm of the threat. [default: the run's]"),
    click.option("--eps", help="Radius in [0, 1] pixels, such as 8/255. [default: the run's]"),
    click.option("--dataset", help="Another data set. [default: the run's]"),
    click.option("-D", "dataset_options", metavar="KEY=VALUE", multiple=True, help="Option of that data set."),
    click.option("--data-dir", type=PATH, help="Where the data set's files are."),
    click.option("--weights-file", type=PATH,
                 help="Weights for the model that MODULE:FUNCTION makes."),
    click.option("--weights-key", metavar="KEY", help="Which weights of that file, such as state_dict_ema or "
                 "model.module. [default: those that fit, averaged before raw]"),
    click.option("-N", "model_options", metavar="KEY=VALUE", multiple=True, help="Argument of that function."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                 help="Decides every random draw."),
    click.option("--batch-size", type=click.IntRange(1), help="Images attacked at once. [default: 250]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
)  # fmt: skip

json_option = click.option("--json", "json_file", type=PATH, help="Write every figure to this new file.")


def _trust(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    from at_smooth.trust import module_of, trust_code

    for name in names:
        module_of(name)
    trust_code(names)


#: On every command that imports code which a run, a checkpoint or a recipe names.
trust_option = click.option(
    "--trust",
    metavar="MODULE:NAME",
    multiple=True,
    expose_value=False,
    callback=_trust,
    help="Import this code if a run, a checkpoint or a recipe file names it; what you have trained with here is "
    "trusted. See docs/security.md.",
)


#: What an interrupted evaluation says.
CARRIES_ON = "the same command carries on from the last finished batch"


def wanted_from(given: dict[str, Any]) -> Wanted:
    """What a command line says of its subject."""
    from at_smooth.subject import Wanted

    pairs = {name: pairs_of(given[name]) or None for name in ("dataset_options", "model_options")}
    return Wanted(**{**given, **pairs})


def labels_of(names: tuple[str, ...]) -> dict[str, str]:
    """The evaluators' names of ``--with``, by label.

    Raises:
        OptionError: A label comes twice, or is empty.
    """
    chosen: dict[str, str] = {}
    for text in names:
        label, equals, name = text.rpartition("=")
        label = label if equals else name
        if not label or label in chosen:
            raise OptionError(f"--with {text}: each result needs a label of its own. Write LABEL={name}.")
        chosen[label] = name
    return chosen


def evaluators_from(chosen: dict[str, str], options: tuple[str, ...]) -> dict[str, Evaluator]:
    """The evaluators of :func:`labels_of`, with the options of ``-E``, by label.

    Raises:
        PluginError: An evaluator is unknown or broken.
        OptionError: An option is of no evaluator named, or does not fit.
    """
    from at_smooth import registry

    given: dict[str, dict[str, Any]] = {label: {} for label in chosen}
    for text in options:
        key, equals, value = text.partition("=")
        label, dot, option = key.strip().rpartition(".")
        if equals and (not dot or label not in given):
            raise OptionError(f"-E {key} should be EVALUATOR.OPTION=VALUE, with one of {', '.join(given)}.")
        given.get(label, {}).update(pairs_of((f"{option}{equals}{value}",)))
    return {label: registry.create("evaluators", name, given[label]) for label, name in chosen.items()}


def pairs_of(texts: tuple[str, ...]) -> dict[str, Any]:
    """Options given as ``key=value``, the values read as YAML; what is none is taken as the text that it is.

    Raises:
        OptionError: A text is not of that form, or goes beyond the limits of YAML that is read.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"'{text}' is not of the form key=value.")
        try:
            pairs[key.strip().replace("-", "_")] = parse_yaml(value)
        except LimitError as error:
            raise OptionError(f"{key.strip()}: the value cannot be read: {error}.") from None
        except ValueError:
            pairs[key.strip().replace("-", "_")] = value
    return pairs
