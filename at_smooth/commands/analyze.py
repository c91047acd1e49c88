"""``at-smooth analyze``: figures from finished runs, and the numbers behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH, pairs_of, trust_option


@click.command()
@click.argument("name", required=False)
@click.argument("runs", metavar="RUN...", nargs=-1, type=PATH)
@click.option("--out", type=PATH, help="Folder for the files. [default: analyses/ in the run, or "
              "in the working directory where there are several]")  # fmt: skip
@click.option("-O", "options", metavar="KEY=VALUE", multiple=True, help="Option of the analysis.")
@click.option("--weights", type=click.Choice(["reported", "raw", "smoothed"]), help="Which weights. [default: the "
              "smoothed where there are such]")  # fmt: skip
@click.option("--checkpoint", type=click.Choice(["final", "best"]), help="Last epoch, or best by validation. "
              "[default: final]")  # fmt: skip
@click.option("--n-examples", type=int, help="At most so many test images, drawn by the seed.")
@click.option("--seed", type=int, help="Decides every random draw. [default: 0]")
@click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]")
@click.option("--width", type=click.Choice(["column", "double"]), help="Of the figure. [default: the analysis' own]")
@trust_option
def analyze(name: str | None, runs: tuple[Path, ...], out: Path | None, options: tuple[str, ...], **given: Any) -> None:
    """Draw the analysis NAME of each RUN: a figure (PNG, SVG), and the numbers behind it (CSV).

    Runs that differ in nothing but the seed share a setting. Without NAME, lists the analyses.
    """
    from at_smooth import analysis, printing, registry
    from at_smooth.exceptions import InputError
    from at_smooth.terminal import Console

    console = Console()
    if name is None:
        listing = printing.listing("analyses", "name", "what it shows")
        for entry in registry.entries("analyses"):
            listing.add_row(entry.name, _first_line(entry))
        console.print(listing)
        console.print("Draw one: at-smooth analyze NAME RUN...")
        return
    registry.find("analyses", name)
    if not runs:
        raise InputError(f"of which runs? at-smooth analyze {name} RUN..., with one run directory or more.")
    chosen = {key: value for key, value in given.items() if value is not None}
    with interruptible(lambda: "nothing was written"):
        files = analysis.analyze(name, runs, out, {**chosen, **pairs_of(options)})
    for file in files:
        console.print(str(file), soft_wrap=True)


def _first_line(entry: Any) -> str:
    from at_smooth.exceptions import PluginError

    try:
        return (entry.load().__doc__ or "").strip().partition("\n")[0]
    except PluginError as error:
        return f"broken: {error}"
