"""``at-smooth report``: one HTML file on runs."""

from __future__ import annotations

from pathlib import Path

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH, trust_option


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="The HTML file, new. [default: report.html in the run, or "
              "in the working directory where there are several]")  # fmt: skip
@click.option("--figures", default="curves", show_default=True, metavar="NAME,NAME,...",
              help="Analyses to draw (see 'at-smooth plugins analyses'); none for none.")  # fmt: skip
@trust_option
def report(runs: tuple[Path, ...], out: Path | None, figures: str) -> None:
    """Write a report on RUNS, finished or not: one HTML file that needs no network.

    Tables with intervals, robust overfitting at a glance, evaluations and audits, figures, differences of the recipes,
    environments, and the command that repeats each run. Tables also as Markdown and LaTeX.
    """
    from at_smooth.html_report import write_report
    from at_smooth.terminal import Console

    names = [name.strip() for name in figures.split(",") if name.strip() and name.strip() != "none"]
    with interruptible(lambda: "nothing was written"):
        path = write_report(runs, out, names)
    Console().print(f"report: {path}", soft_wrap=True)
