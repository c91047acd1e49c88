"""``at-smooth doctor``: what a bug report needs."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Print what a bug report needs, and test whether training, saving and resuming work here."""
    from at_smooth.doctor import examine
    from at_smooth.terminal import Console

    examine(Console())
