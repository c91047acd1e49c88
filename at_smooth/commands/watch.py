"""``at-smooth watch``: a run while it is going on."""

from __future__ import annotations

import time
from pathlib import Path

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--once", is_flag=True, help="Show how it is now, and stop.")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks.")
@click.pass_context
def watch(context: click.Context, run: Path, once: bool, every: float) -> None:
    """Show the curves of RUN while it is trained, until it is finished.

    Where output is no terminal, a line an epoch. Watching changes nothing; Ctrl-C ends it, not the training.
    """
    from at_smooth import watch as watching
    from at_smooth.output import nobody_reads
    from at_smooth.run import Run
    from at_smooth.terminal import Console

    followed, console = Run(run), Console()

    def pause(seconds: float) -> None:
        if nobody_reads():
            context.exit()
        time.sleep(seconds)

    try:
        with interruptible(lambda: "stopped watching"):
            if once:
                watching.once(followed, console)
            else:
                watching.follow(followed, console, every, pause)
    except KeyboardInterrupt as stop:
        context.exit(getattr(stop, "exit_code", 130))
