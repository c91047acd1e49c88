"""What the command prints beside progress and result tables."""

from __future__ import annotations

import inspect

import torch
from pydantic.fields import FieldInfo
from rich import box
from rich.table import Table as Listing
from rich.text import Text

from at_smooth.data import held_out
from at_smooth.experiment import planned_teachers, prepare_data
from at_smooth.interfaces import Dataset, Size
from at_smooth.network import build_network
from at_smooth.presets import Table
from at_smooth.recipe import Recipe
from at_smooth.registry import Entry
from at_smooth.reproduce import Forecast, Planned, own_figures
from at_smooth.runtime import Runtime, describe
from at_smooth.teachers import Kinship
from at_smooth.terminal import Console


def listing(title: str, *columns: str) -> Listing:
    """An empty table; names of runs and columns of words ("what ...") may wrap, the others stay on one line."""
    table = Listing(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=not column.startswith(("what", "run")), overflow="fold")
    return table


def headline(recipe: Recipe) -> Text:
    """What is about to be trained, in a line."""
    neutral = {Recipe.model_fields[field].default for field in ("regularizer", "smoother")}
    parts = [recipe.method, *(choice for choice in (recipe.regularizer, recipe.smoother) if choice not in neutral)]
    return Text.assemble(
        (" + ".join(parts), "bold"),
        f": {recipe.model} on {recipe.dataset}, {recipe.threat}, "
        f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}, seed {recipe.seed}",
    )


def plan(recipe: Recipe) -> str:
    """The resolved recipe, and what it comes to on this machine; everything is checked that training would check.

    Where the data set would have to be downloaded first, nothing is: the plan then says what it could not know.

    Raises:
        InputError: The recipe cannot be carried out.
    """
    runtime = Runtime.choose(recipe.device, recipe.precision, recipe.compile)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    dataset: Dataset = recipe.plugin("dataset")
    here = dataset.available(recipe.data_dir)
    lines = _plan_with_data(recipe) if here else _plan_without_data(recipe, dataset.published)
    return "\n# ".join([recipe.to_yaml().rstrip(), *lines, f"device: {describe(runtime.device)}"])


def _plan_with_data(recipe: Recipe) -> list[str]:
    data = prepare_data(recipe)
    planned_teachers(recipe, Kinship(recipe, data.fingerprint(), data.shape, data.num_classes))
    return [
        f"parameters: {_parameters(recipe, data.shape, data.num_classes):,}",
        f"images: {data.train.n:,} to train, {data.val.n:,} to validate, {data.test.n:,} to test",
    ]


def _plan_without_data(recipe: Recipe, size: Size | None) -> list[str]:
    planned_teachers(recipe)
    unchecked = (
        "not checked: the data, whose files are not here (a dry run downloads nothing), and teachers against them"
    )
    if size is None:
        return ["parameters: not known before the data are here", "images: not known either", unchecked]
    n_val = held_out(size.train, recipe.validation)
    return [
        f"parameters: {_parameters(recipe, size.shape, size.num_classes):,}",
        f"images, as published: {size.train - n_val:,} to train, {n_val:,} to validate, {size.test:,} to test",
        unchecked,
    ]


def _parameters(recipe: Recipe, shape: tuple[int, int, int], num_classes: int) -> int:
    blank = ([0.0] * shape[0], [1.0] * shape[0])  # statistics are no parameters
    return sum(parameter.numel() for parameter in build_network(recipe, shape, num_classes, blank).parameters())


def print_plugin(console: Console, entry: Entry) -> None:
    """What a plugin is, and its options."""
    plugin = entry.load()
    source = f"{entry.distribution} {entry.version}".strip()
    console.print(Text.assemble((entry.name, "bold"), f" ({entry.kind}, from {source})"))
    console.print(inspect.getdoc(plugin) or "")
    if not plugin.model_fields:
        console.print("\nNo options.")
        return
    table = listing("options", "name", "default", "bounds", "what it is")
    for name, field in plugin.model_fields.items():
        table.add_row(name, str(field.default), _bounds(field), field.description or "")
    console.print(table)


def print_forecast(console: Console, planned: list[Planned]) -> None:
    """The runs that a table consists of, with the time that each takes."""
    forecast = Forecast()
    table = listing("runs", "run", "teachers first", "time", "what")
    total = 0.0
    for item in planned:
        recipe, done = item.recipe, item.run is not None
        seconds = 0.0 if done else forecast.seconds(recipe)
        total += seconds
        what = f"{recipe.method}/{recipe.attack} {recipe.threat}; {recipe.model} on {recipe.dataset}"
        teachers = ", ".join(forecast.teachers(recipe)) or "-"
        table.add_row(item.row.name, teachers, "done" if done else _duration(seconds), what)
    console.print(table)
    console.print(f"all of it on this device, about: {_duration(total)}")


def print_reproduced(console: Console, table: Table, planned: list[Planned]) -> None:
    """Our figures beside the paper's, of the rows that are finished."""
    printed = listing("ours/the paper's, percent", "run", "RA best", "RA final", "SA best", "SA final")
    for item in planned:
        figures = own_figures(item.run, table.last5) if item.run else []
        ours = ["-" if value is None else f"{value:.2f}" for value in figures]
        pairs = zip(ours, item.row.paper, strict=False)
        printed.add_row(item.row.name, *(f"{own}/{theirs:.2f}" for own, theirs in pairs))
    console.print(printed)


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    )


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if days < 3 else f"{days:.1f} days"
