"""Runs by setting: those that differ in nothing but the seed belong together, and each setting has a name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from at_smooth.notes import notify
from at_smooth.reading import yaml_of
from at_smooth.recipe import CIRCUMSTANCES, Recipe
from at_smooth.records import RecordedRecipe
from at_smooth.run import Run

#: The two families of remedies against robust overfitting, and the choice that is none.
REMEDIES = {field: Recipe.model_fields[field].default for field in ("regularizer", "smoother")}


def by_setting(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Each setting by its name, with its runs, in the order of the runs given."""
    return grouped(runs, [recorded(run) for run in runs])


def grouped(runs: Sequence[Run], recipes: Sequence[dict[str, Any]]) -> list[tuple[str, list[Run]]]:
    """Each setting by its name, with its runs: those of the same recipe but for the seed, and of the same test images.

    Runs of one setting and the same seed are notified, since they are no sample of the seeds.
    The recipe does not say where the images lie, so runs of different images may share it. Of a run that is not
    finished, or by an older version, the images are not known; it goes with the first of its recipe.

    Args:
        runs: In the order in which the settings appear.
        recipes: Of each run, every field in plain types.
    """
    keys = [(setting(recipe), tested_on(run)) for run, recipe in zip(runs, recipes, strict=True)]
    known = {recipe: images for recipe, images in reversed(keys) if images}
    groups: dict[tuple[str, str | None], list[Run]] = defaultdict(list)
    seeds: dict[tuple[str, str | None], Counter[int]] = defaultdict(Counter)
    recipe_of: dict[tuple[str, str | None], dict[str, Any]] = {}
    for run, recipe, (name, images) in zip(runs, recipes, keys, strict=True):
        key = name, images or known.get(name)
        groups[key].append(run)
        seeds[key][recipe["seed"]] += 1
        recipe_of.setdefault(key, recipe)
    names = labels(list(recipe_of.values()))
    twice = {name for name in names if names.count(name) > 1}
    names = [
        f"{name} (test images {images})" if name in twice else name
        for name, (_, images) in zip(names, groups, strict=True)
    ]
    for name, own in zip(names, seeds.values(), strict=True):
        seed, times = own.most_common(1)[0]
        if times > 1:
            notify(
                f"{times} runs of {name} have the same seed, {seed}; a deviation over the seeds counts each. "
                f"Leave out all but one of them."
            )
    return list(zip(names, groups.values(), strict=True))


def tested_on(run: Run) -> str | None:
    """A digest of the test images that a finished run was measured on; None where it is not known."""
    return run.summary.get("test_set") if run.finished else None


def recorded(run: Run) -> dict[str, Any]:
    """A run's recipe as it was written down, whether or not its plugins are installed here.

    Raises:
        FileError: It is not the whole recipe that a run writes down.
        RunError: It is not what the run was trained with.
    """
    yaml_of(run.path / "recipe.yaml", RecordedRecipe)
    return run.recorded


def setting(recipe: dict[str, Any], apart_from: Sequence[str] = ()) -> str:
    """What two recipes share that are one setting, as a key.

    Args:
        recipe: Every field in plain types.
        apart_from: Fields that may differ besides.
    """
    ignored = {"seed", *CIRCUMSTANCES, *apart_from}
    return repr(sorted((field, repr(value)) for field, value in recipe.items() if field not in ignored))


def labels(recipes: list[dict[str, Any]]) -> list[str]:
    """What each setting is: method and smoothers, and whatever else is not the same in all of them."""
    hidden = {"seed", *CIRCUMSTANCES, "method", *REMEDIES}
    names = []
    for recipe in recipes:
        parts = [recipe["method"], *(recipe[field] for field in REMEDIES if recipe[field] != REMEDIES[field])]
        details = []
        for field, value in recipe.items():
            chooser = field.removesuffix("_options")
            if field in hidden:
                continue
            if chooser != field and isinstance(value, dict):  # options are compared among those of the same choice
                twins = [other.get(field) or {} for other in recipes if other.get(chooser) == recipe.get(chooser)]
                details += [
                    f"{key}={value[key]}" for key in value if any(twin.get(key) != value[key] for twin in twins)
                ]
            elif any(other.get(field) != value for other in recipes):
                details.append(f"{field}={value}")
        names.append(" + ".join(parts) + (f" ({', '.join(details)})" if details else ""))
    return names
