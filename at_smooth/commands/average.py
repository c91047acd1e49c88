"""``at-smooth average``: SWA afterwards, from snapshots."""

from __future__ import annotations

from pathlib import Path

import click

from at_smooth.commands.options import PATH, trust_option


@click.command()
@click.argument("run", type=PATH)
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=1),
    required=True,
    metavar="EPOCH",
    help="First epoch to average, counted from 1 as in metrics.csv.",
)
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Epochs from one to the next.")
@click.option("--to", "last", type=click.IntRange(min=1), metavar="EPOCH", help="Last epoch. [default: the last kept]")
@click.option(
    "--bn",
    type=click.Choice(["clean", "adversarial"]),
    default="clean",
    show_default=True,
    help="Images from which the average's BatchNorm statistics are taken.",
)
@click.option("--out", type=PATH, help="File to write. [default: RUN/checkpoints/average-....pt]")
@trust_option
def average(run: Path, first: int, every: int, last: int | None, bn: str, out: Path | None) -> None:  # fmt: skip
    """Average the snapshots that RUN kept (SWA), measure the average and save it.

    A run keeps snapshots if it is trained with --keep-checkpoints every=N.
    """
    from at_smooth.average import average_snapshots
    from at_smooth.terminal import Console

    result = average_snapshots(run, first=first, every=every, last=last, bn=bn, out=out)
    console = Console()
    console.print(f"average of epochs {', '.join(map(str, result.epochs))}; BatchNorm on {bn} images")
    for part, (sa, ra) in result.accuracies.items():
        console.print(f"{part:<12}SA {sa:.2f} %   RA {ra:.2f} %")
    console.print(f"checkpoint: {result.path}", soft_wrap=True)
