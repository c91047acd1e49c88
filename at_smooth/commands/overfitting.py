"""``at-smooth overfitting``: when RA begins to decline, how far it falls, what a remedy recovers."""

from __future__ import annotations

from pathlib import Path

import click

from at_smooth.commands.options import PATH


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--format", "style", type=click.Choice(["text", "markdown", "latex", "csv"]), default="text",
              show_default=True, help="How to print the table; csv has a row a run, every figure in full.")  # fmt: skip
def overfitting(runs: tuple[Path, ...], style: str) -> None:
    """Print when the RA of RUNS begins to decline, how far it falls, and what each remedy recovers.

    Runs that differ in nothing but the seed share a row. A remedy is set against the run without regularizer and
    smoother, where that is among them.
    """
    from at_smooth.analysis import as_csv
    from at_smooth.exceptions import RunError
    from at_smooth.output import echo
    from at_smooth.recovery import at_a_glance, figures, table
    from at_smooth.run import Run
    from at_smooth.terminal import Console

    seen = at_a_glance([Run(path) for path in runs])
    if not seen:
        raise RunError(f"no epoch is measured yet in {', '.join(map(str, runs))}. Try again when one is.")
    if style == "text":
        Console().print(table(seen).rich())
    else:
        echo(as_csv(figures(seen)).rstrip() if style == "csv" else table(seen).formatted(style))
