"""The command ``at-smooth``. Errors become exit codes here and nowhere else."""

from __future__ import annotations

import errno
import signal
from typing import Any

import click

from at_smooth._version import __version__
from at_smooth.commands.analyze import analyze
from at_smooth.commands.audit import audit
from at_smooth.commands.average import average
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
from at_smooth.exceptions import AtSmoothError, InputError, Interrupted


class _Group(click.Group):
    """Turns the family of errors into one message on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AtSmoothError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a full disk under the standard output, say
            if error.errno == errno.EPIPE:
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(InputError.exit_code)
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


for command in (
    *(train, watch, evaluate, audit, transfer),
    *(compare, overfitting, analyze, report),
    *(reproduce, average, export, plugins, doctor),
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the command."""
    cli()


if __name__ == "__main__":
    main()
