"""The command ``at-smooth``. Errors become exit codes here and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from at_smooth._version import __version__
from at_smooth.commands.analyze import analyze
from at_smooth.commands.audit import audit
from at_smooth.commands.average import average
from at_smooth.commands.bench import bench
from at_smooth.commands.compare import compare
from at_smooth.commands.doctor import doctor
from at_smooth.commands.evaluate import evaluate
from at_smooth.commands.export import export
from at_smooth.commands.overfitting import overfitting
from at_smooth.commands.plugins import plugins
from at_smooth.commands.report import report
from at_smooth.commands.reproduce import reproduce
from at_smooth.commands.train import train
from at_smooth.commands.transfer import transfer
from at_smooth.commands.watch import watch
from at_smooth.early_words import first_here, several, wait_to_speak
from at_smooth.exceptions import AtSmoothError, InputError, Interrupted, exit_code_of, interruptions
from at_smooth.interruption import ignore_signals
from at_smooth.notes import printed_by
from at_smooth.output import echo, lasting_output, output_failure, printable


class _Group(click.Group):
    """Turns the family of errors into one message on standard error and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        with lasting_output():
            try:
                return super().main(*args, **extra)
            except SystemExit as end:
                if not end.code and (reason := output_failure()):
                    echo(f"Error: standard output could not be written ({reason}); the work itself is done.", err=True)
                    raise SystemExit(InputError.exit_code) from None
                raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _said_once(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _said_once(ctx), printed_by(_print_note):
            return super().invoke(ctx)


@contextmanager
def _said_once(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except AtSmoothError as error:
        _end(ctx, f"Error: {error}", error)
    except OSError as error:
        _end(ctx, f"Error: {error}", error)
    except click.ClickException as error:  # click says it
        wait_to_speak()
        vars(error)["message"] = printable(error.message)
        raise
    except Interrupted as stop:
        _end(ctx, f"{stop.name}: {stop}", stop)
    except KeyboardInterrupt as stop:
        for ended in interruptions(stop)[:1]:  # by an earlier Ctrl-C, of which there is more to say
            _end(ctx, f"{ended.name}: {ended}", ended)
        if several():  # the terminal and torchrun both send it
            ignore_signals()
        _end(ctx, "SIGINT: stopped before anything began", stop)


def _print_note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0" or not several():  # all ranks read the same data
        echo(f"note: {text}", err=True)


def _end(ctx: click.Context, text: str, error: BaseException) -> None:
    torchrun = sys.modules.get("at_smooth.torchrun")
    if torchrun is not None and torchrun.can_agree():
        ctx.exit(torchrun.last_words(text, error))
    if first_here() or not isinstance(error, KeyboardInterrupt):  # Ctrl-C is everyone's, and torchrun only waits then
        echo(wait_to_speak() + text, err=True)
    ctx.exit(exit_code_of(error))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="at-smooth")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Adversarial training with learned smoothening.

    'at-smooth train' alone trains the embedded digits.
    """
    if several() and ctx.invoked_subcommand != train.name:
        raise InputError(f"'{ctx.invoked_subcommand}' works in one process; torchrun is for 'train'. Start it alone.")


for command in (
    *(train, watch, evaluate, audit, transfer),
    *(compare, overfitting, analyze, report),
    *(reproduce, average, export, plugins, bench, doctor),
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the command."""
    cli()


if __name__ == "__main__":
    main()
