"""``at-smooth reproduce``: a table of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH, trust_option
from at_smooth.commands.recipe_options import changes_from


@click.command()
@click.argument("table", required=False)
@click.option("--out", type=PATH, help="Folder of the run directories. [default: under runs/]")
@click.option("--dry-run", is_flag=True, help="Print the runs and a forecast of the time that each takes.")
@click.option("--preset", help="Preset to base the runs on, such as official-code. [default: the table's]")
@click.option("--rehearse", is_flag=True, help="Shrink every run to the embedded digits: same plugins, in minutes.")
@click.option("--data-dir", type=PATH, help="Where the data set's files are.")
@click.option("--seed", type=int, help="Decides split, order, initial weights and noise. [default: 0]")
@click.option("--device", help="auto, cpu, cuda, cuda:1, ... [default: auto]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of training.")
@click.option("--compile/--no-compile", default=None, help="Compile the models.")
@click.option("--override", is_flag=True, help="Carry on with runs on another device, by other versions and such.")
@click.option("--set", "others", metavar="KEY=VALUE", multiple=True, help="Any other field, in every run.")
@trust_option
def reproduce(
    table: str | None, out: Path | None, dry_run: bool, preset: str | None, rehearse: bool, override: bool, **given: Any
) -> None:
    """Run a table of the paper, and print its numbers beside the paper's.

    Without TABLE, lists the tables. What is finished in --out is not run again, what was interrupted goes on.
    """
    from at_smooth import presets, printing
    from at_smooth import reproduce as tables
    from at_smooth.progress import Terminal
    from at_smooth.terminal import Console

    console = Console()
    if table is None:
        listing = printing.listing("tables", "name", "runs", "what it shows")
        for each in presets.tables():
            listing.add_row(each.name, str(len(each.rows)), each.title)
        console.print(listing)
        return
    chosen = presets.table(table)
    path = out or Path("runs") / (f"{table}-rehearsal" if rehearse else table)
    planned = tables.plan(chosen, path, changes_from(given), rehearse, preset)
    console.print(chosen.title, style="bold")
    if dry_run:
        printing.print_forecast(console, planned)
        return
    with interruptible(lambda: "the same command carries on"):
        tables.carry_out(planned, Terminal(console), override)
    printing.print_reproduced(console, chosen, planned)
    if rehearse:
        console.print("A rehearsal shows that every run works; its numbers mean nothing.")
