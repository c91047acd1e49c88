"""``at-smooth train``: a recipe, its self-teachers first."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH, trust_option
from at_smooth.commands.recipe_options import changes_from, recipe_options
from at_smooth.exceptions import DivergedError, InputError


@click.command()
@recipe_options
@click.option("--out", type=PATH, help="Run directory, new or empty. [default: under runs/]")
@click.option("--resume", is_flag=True, help="Continue the run in --out exactly where it was saved last.")
@click.option("--override", is_flag=True, help="Resume on another device, by other versions and such.")
@click.option("--dry-run", is_flag=True, help="Train nothing: print the resolved recipe, parameters and device.")
@trust_option
def train(out: Path | None, resume: bool, override: bool, dry_run: bool, **given: Any) -> None:
    """Train a robust model, its self-teachers first where it needs them."""
    changes = changes_from(given)
    if resume and out is None:
        raise InputError("--resume continues a run: name its directory with --out.")
    if override and not resume:
        raise InputError("--override goes with --resume: it accepts harmless differences from how a run was begun.")

    from at_smooth import experiment
    from at_smooth.presets import recipe_from
    from at_smooth.printing import headline, plan
    from at_smooth.progress import Terminal
    from at_smooth.recipe import Recipe, merge, plugins_in
    from at_smooth.report import rich_table, summary_rows
    from at_smooth.run import Run, refuse_taken
    from at_smooth.terminal import Console
    from at_smooth.torchrun import process_group
    from at_smooth.trust import trust_code

    def chosen() -> Recipe:
        source = given["recipe_name"]
        if resume and out is not None:
            if not (out / "recipe.yaml").is_file():
                raise InputError(f"there is no run to resume at {out}: it holds no recipe.yaml.")
            if not source:
                trust_code(plugins_in(changes).values())
                return Recipe(out / "recipe.yaml", **merge(Run(out).recorded, changes))
        return recipe_from(source, changes) if source else Recipe(**changes)

    def advice() -> str:
        if not (path / "recipe.yaml").exists():
            return "nothing was written yet"
        also = ", by torchrun on any number of processes or without it" if ranks.count > 1 else ""
        return f"continue with: at-smooth train --out {shlex.quote(str(path))} --resume{also}"

    with process_group() as ranks:
        recipe = ranks.by_first(chosen)
        trust_code(plugins_in(recipe.to_dict()).values())  # the first rank has decided for all
        console = Console(quiet=not ranks.first)
        if dry_run:
            console.out(plan(recipe))
            return
        with experiment.run_directory(recipe, out, ranks) as path:
            if not resume:
                ranks.by_first(lambda: refuse_taken(path))
            console.print(headline(recipe), soft_wrap=True)
            console.print(f"run directory: {path}", soft_wrap=True)
            with interruptible(advice), _retry_offered(recipe.on_divergence, path):
                run = experiment.train(recipe, path, resume=resume, override=override, progress=Terminal(console))
        if not ranks.first:
            return
        if recipe.test_every:
            console.print()
            console.print(rich_table(summary_rows(run.summary), "test accuracy, percent"))
        console.print(f"curves: {run.path / 'curves.png'}", soft_wrap=True)


@contextmanager
def _retry_offered(on_divergence: str, path: Path) -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        if on_divergence == "stop" and (path / "checkpoints" / "last.pt").is_file():
            command = f"at-smooth train --out {shlex.quote(str(path))} --resume --on-divergence retry --override"
            error.add(f"To go on from there with half the learning rate: {command}")
        raise
