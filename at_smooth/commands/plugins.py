"""``at-smooth plugins``: what is installed."""

from __future__ import annotations

import click


@click.command()
@click.argument("kind", required=False)
@click.argument("name", required=False)
def plugins(kind: str | None, name: str | None) -> None:
    """List the installed plugins, or print the options of one.

    KIND is methods, regularizers, smoothers, datasets, models, ...; NAME is one of its plugins.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from at_smooth import registry
    from at_smooth.terminal import Console

    console = Console()
    if kind and name:
        from at_smooth.printing import print_plugin
        from at_smooth.trust import trust_code

        trust_code([name])
        print_plugin(console, registry.find(kind, name))
        return
    table = Table(title="plugins", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("kind", "name", "distribution"):
        table.add_column(column, no_wrap=True)
    for each in [kind] if kind else registry.KINDS:
        for entry in registry.entries(each):
            table.add_row(entry.kind, entry.name, f"{entry.distribution} {entry.version}")
    console.print(table)
    console.print("Options of one: at-smooth plugins KIND NAME")
