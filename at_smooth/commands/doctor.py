"""``at-smooth doctor``: what a bug report needs."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Print what a bug report needs, and test whether training, saving and resuming work here."""
    from rich.console import Console

    from at_smooth.doctor import examine

    examine(Console())
