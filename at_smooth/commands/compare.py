"""``at-smooth compare``: the paper's table for finished runs."""

from __future__ import annotations

from pathlib import Path

import click

from at_smooth.commands.options import PATH


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--format", "style", type=click.Choice(["text", "markdown", "latex", "csv"]), default="text",
              show_default=True, help="How to print the table.")  # fmt: skip
def compare(runs: tuple[Path, ...], style: str) -> None:
    """Print the paper's table for finished RUNS: best, final and diff of RA and SA.

    Runs that differ in nothing but the seed share a row, with mean and standard deviation.
    """
    from at_smooth.output import echo
    from at_smooth.report import comparison_rows, format_table, rich_table
    from at_smooth.run import Run
    from at_smooth.terminal import Console

    rows = comparison_rows([Run(path) for path in runs])
    if style == "text":
        Console().print(rich_table(rows, "test accuracy of the reported weights, percent"))
    else:
        echo(format_table(rows, style))
