"""The command ``at-smooth``. Errors become exit codes here and nowhere else."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
import yaml

from at_smooth._version import __version__
from at_smooth.commands.analyze import analyze
from at_smooth.commands.audit import audit
from at_smooth.commands.evaluate import evaluate
from at_smooth.commands.export import export
from at_smooth.commands.overfitting import overfitting
from at_smooth.commands.report import report
from at_smooth.commands.transfer import transfer
from at_smooth.commands.watch import watch
from at_smooth.exceptions import AtSmoothError, InputError, Interrupted, OptionError

# torch takes seconds to import, so each command imports what it needs.

_F = TypeVar("_F", bound=Callable[..., Any])

_PLUGIN_OPTIONS = {
    "D": ("dataset", "the data set"),
    "N": ("model", "the model (network)"),
    "M": ("method", "the method"),
    "A": ("attack", "the attack (steps, step_size, random_start, mode)"),
    "R": ("regularizer", "the regularizer"),
    "S": ("smoother", "the smoother"),
}


class _Group(click.Group):
    """Turns the family of errors into one message on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AtSmoothError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except Interrupted as stop:
            click.echo(f"{stop.name}: {stop}", err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("SIGINT: stopped before anything began", err=True)
            ctx.exit(128 + signal.SIGINT)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="at-smooth")
def cli() -> None:
    """Adversarial training with learned smoothening.

    'at-smooth train' alone trains the embedded digits.
    """


def _recipe_options(command: _F) -> _F:
    """The options of ``train`` that are fields of a recipe; None where not given."""
    options = [
        click.option("--dataset", help="Data set (see 'at-smooth plugins datasets'). [default: digits]"),
        click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data set's files are."),
        click.option("--model", help="Architecture (see 'at-smooth plugins models'). [default: the data set's]"),
        click.option("--method", help="Training method (see 'at-smooth plugins methods'). [default: at]"),
        click.option("--attack", help="Attack to train on. [default: pgd]"),
        click.option("--norm", type=click.Choice(["Linf", "L2"]), help="Norm of the threat. [default: Linf]"),
        click.option("--eps", help="Radius of the threat in [0, 1] pixels, such as 8/255. [default: the data set's]"),
        click.option("--regularizer", help="What smooths the logits (see 'at-smooth plugins regularizers')."),
        click.option("--smoother", help="What smooths the weights (see 'at-smooth plugins smoothers')."),
        click.option("--epochs", type=int, help="Passes over the training set."),
        click.option("--batch-size", type=int, help="Images in a step."),
        click.option("--lr", type=float, help="Learning rate at the start."),
        click.option("--seed", type=int, help="Decides split, order, initial weights and noise. [default: 0]"),
        click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]"),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of training."),
        click.option("--compile/--no-compile", default=None, help="Compile the model; pays for large networks."),
        click.option("--validate-every", type=int, help="Epochs between measurements on the validation set."),
        click.option("--test-every", type=int, help="Epochs between measurements on the test set; 0 for never."),
        *(
            click.option(f"-{letter}", f"{field}_options", metavar="KEY=VALUE", multiple=True,
                         help=f"Option of {words}.")
            for letter, (field, words) in _PLUGIN_OPTIONS.items()
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


@cli.command()
@_recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Run directory, new or empty. [default: under runs/]")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last finished epoch.")
@click.option("--dry-run", is_flag=True, help="Train nothing: print the resolved recipe, parameters and device.")
def train(out: Path | None, resume: bool, dry_run: bool, **given: Any) -> None:
    """Train a robust model, its self-teachers first where it needs them."""
    changes = _changes(given)
    if resume and out is None:
        raise InputError("--resume continues a run: name its directory with --out.")

    from rich.console import Console

    from at_smooth import experiment
    from at_smooth.presets import recipe_from
    from at_smooth.printing import headline, plan
    from at_smooth.progress import Terminal
    from at_smooth.recipe import Recipe
    from at_smooth.report import rich_table, summary_rows
    from at_smooth.run import refuse_taken

    source = given["recipe_name"]
    if resume and out is not None:
        source = source or str(out / "recipe.yaml")
        if not (out / "recipe.yaml").is_file():
            raise InputError(f"there is no run to resume at {out}: it holds no recipe.yaml.")
    recipe = recipe_from(source, changes) if source else Recipe(**changes)
    if dry_run:
        click.echo(plan(recipe))
        return

    console = Console()
    path = out or experiment.free_path(recipe)
    if not resume:
        refuse_taken(path)
    console.print(headline(recipe), highlight=False, soft_wrap=True)
    console.print(f"run directory: {path}", highlight=False, soft_wrap=True)

    def advice() -> str:
        if not (path / "recipe.yaml").exists():
            return "stopped before anything was written"
        return f"stopped; continue with: at-smooth train --out {shlex.quote(str(path))} --resume"

    with _interruptible(advice):
        run = experiment.train(recipe, path, resume=resume, progress=Terminal(console))
    if recipe.test_every:
        console.print()
        console.print(rich_table(summary_rows(run.summary), "test accuracy, percent"))
    console.print(f"curves: {run.path / 'curves.png'}", highlight=False, soft_wrap=True)


@cli.command()
@click.argument("kind", required=False)
@click.argument("name", required=False)
def plugins(kind: str | None, name: str | None) -> None:
    """List the installed plugins, or print the options of one.

    KIND is methods, regularizers, smoothers, datasets, models, ...; NAME is one of its plugins.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from at_smooth import registry

    console = Console()
    if kind and name:
        from at_smooth.printing import print_plugin

        print_plugin(console, registry.find(kind, name))
        return
    table = Table(title="plugins", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("kind", "name", "distribution"):
        table.add_column(column, no_wrap=True)
    for each in [kind] if kind else registry.KINDS:
        for entry in registry.entries(each):
            table.add_row(entry.kind, entry.name, f"{entry.distribution} {entry.version}")
    console.print(table)
    console.print("Options of one: at-smooth plugins KIND NAME", highlight=False)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["text", "markdown", "latex", "csv"]), default="text",
              show_default=True, help="How to print the table.")  # fmt: skip
def compare(runs: tuple[Path, ...], style: str) -> None:
    """Print the paper's table for finished RUNS: best, final and diff of RA and SA.

    Runs that differ in nothing but the seed share a row, with mean and standard deviation.
    """
    from rich.console import Console

    from at_smooth.report import comparison_rows, format_table, rich_table
    from at_smooth.run import Run

    rows = comparison_rows([Run(path) for path in runs])
    if style == "text":
        Console().print(rich_table(rows, "test accuracy of the reported weights, percent"))
    else:
        click.echo(format_table(rows, style))


@cli.command()
@click.argument("table", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run directories. [default: under runs/]")
@click.option("--dry-run", is_flag=True, help="Print the runs and a forecast of the time that each takes.")
@click.option("--preset", help="Preset to base the runs on, such as official-code. [default: the table's]")
@click.option("--rehearse", is_flag=True, help="Shrink every run to the embedded digits: same plugins, in minutes.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data set's files are.")
@click.option("--seed", type=int, help="Decides split, order, initial weights and noise. [default: 0]")
@click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of training.")
@click.option("--compile/--no-compile", default=None, help="Compile the models.")
@click.option("--set", "others", metavar="KEY=VALUE", multiple=True, help="Any other field, in every run.")
def reproduce(
    table: str | None, out: Path | None, dry_run: bool, preset: str | None, rehearse: bool, **given: Any
) -> None:
    """Run a table of the paper, and print its numbers beside the paper's.

    Without TABLE, lists the tables. What is finished in --out is not run again, what was interrupted goes on.
    """
    from rich.console import Console

    from at_smooth import presets, printing
    from at_smooth import reproduce as tables
    from at_smooth.progress import Terminal

    console = Console()
    if table is None:
        listing = printing.listing("tables", "name", "runs", "what it shows")
        for each in presets.tables():
            listing.add_row(each.name, str(len(each.rows)), each.title)
        console.print(listing)
        return
    chosen = presets.table(table)
    path = out or Path("runs") / (f"{table}-rehearsal" if rehearse else table)
    planned = tables.plan(chosen, path, _changes(given), rehearse, preset)
    console.print(f"[bold]{chosen.title}[/bold]", highlight=False)
    if dry_run:
        printing.print_forecast(console, planned)
        return
    with _interruptible(lambda: "stopped; the same command carries on"):
        tables.carry_out(planned, Terminal(console))
    printing.print_reproduced(console, chosen, planned)
    if rehearse:
        console.print("A rehearsal shows that every run works; its numbers mean nothing.", highlight=False)


for command in (evaluate, transfer, audit, export, analyze, overfitting, report, watch):
    cli.add_command(command)


def main() -> None:
    """Entry point of the command."""
    cli()


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that the command line names."""
    fields = {field: value for field, value in given.items() if value is not None}
    for name in ("others", "recipe_name"):
        fields.pop(name, None)
    for field, _ in _PLUGIN_OPTIONS.values():
        pairs = fields.pop(f"{field}_options", ())
        if pairs:
            fields[f"{field}_options"] = _pairs(pairs)
    return {**_pairs(given["others"]), **fields}


def _pairs(texts: tuple[str, ...]) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"'{text}' is not of the form key=value.")
        try:
            pairs[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            pairs[key.strip().replace("-", "_")] = value
    return pairs


@contextmanager
def _interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted` while the block runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, advice())

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
