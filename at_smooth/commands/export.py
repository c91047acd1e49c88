"""``at-smooth export``: a trained network for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.options import PATH, trust_option, weights_options


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT", type=PATH)
@click.option(
    "--format",
    "style",
    type=click.Choice(["robustbench", "torchscript", "onnx"]),
    default="robustbench",
    show_default=True,
    help="Python source and weights, or a traced network.",
)
@click.option("--out", type=PATH, help="Folder, new or empty. [default: RUN/export-FORMAT]")
@weights_options
@click.option("--name", help="For the card: title of the paper.")
@click.option("--authors", help="For the card: its authors.")
@click.option("--venue", help="For the card: where it appeared, such as 'ICLR 2021'.")
@click.option("--paper", "link", help="For the card: its address.")
@click.option("--extra-data", is_flag=True, help="For the card: training used data beside the data set's own.")
@trust_option
def export(source: Path, style: str, out: Path | None, weights: Any, checkpoint: Any, **publication: Any) -> None:
    """Write a trained model to a folder that loads without at-smooth.

    The folder holds weights, definition, eps, results, and RobustBench's new-model card filled in.
    """  # fmt: skip
    from at_smooth.export import Publication, default_path
    from at_smooth.export import export as export_model
    from at_smooth.output import echo

    folder = export_model(
        source,
        out or default_path(source, style),
        style,
        weights=weights,
        checkpoint=checkpoint,
        publication=Publication(**publication),
        note=lambda text: echo(f"note: {text}", err=True),
    )
    echo(f"exported to {folder}; see {folder / 'README.md'}")
