"""What an export says of itself: the fields of RobustBench's leaderboard, and its new-model card filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from at_smooth._version import __version__
from at_smooth.export.figures import Figures
from at_smooth.export.trained import Trained
from at_smooth.threat import format_pixels


@dataclass(frozen=True)
class Publication:
    """What only the authors know.

    Attributes:
        name: The paper's title.
        authors: Their names.
        venue: Where it appeared, as in ``"ICLR 2021"``.
        link: The paper's address.
        extra_data: Whether training used data beside the data set's own.
    """

    name: str | None = None
    authors: str | None = None
    venue: str | None = None
    link: str | None = None
    extra_data: bool = False


def model_info(trained: Trained, figures: Figures, publication: Publication) -> dict[str, Any]:
    """The fields of a model on the leaderboard; a figure that was not measured is null."""
    attacked = figures.leaderboard if figures.complete else None
    reported = attacked or figures.robust
    return {
        "link": publication.link or _to_fill_in("the paper's address"),
        "name": publication.name or _to_fill_in("the paper's title"),
        "authors": publication.authors or _to_fill_in("the authors"),
        "additional_data": publication.extra_data,
        "number_forward_passes": 1,
        "dataset": trained.recipe.dataset,
        "venue": publication.venue or _to_fill_in("the venue, or Unpublished"),
        "architecture": trained.recipe.model,
        "eps": str(format_pixels(trained.recipe.eps)),
        "clean_acc": figures.standard and f"{figures.standard.percent:.2f}",
        "reported": reported and f"{reported.percent:.2f}",
        "autoattack_acc": attacked and f"{attacked.percent:.2f}",
        "unreliable": False,
    }


def evaluate_command(trained: Trained, run: str) -> str:
    """The command that measures what the leaderboard wants."""
    options = [] if trained.moment != "best" else ["--checkpoint best"]
    options += ["--weights raw"] if trained.weights == "raw" else []
    return " ".join([f"at-smooth evaluate {run} --with autoattack", *options])


def card(trained: Trained, figures: Figures, publication: Publication, loading: str, files: dict[str, str]) -> str:
    """The new-model card.

    Args:
        trained: The network.
        figures: What is known of it.
        publication: What its authors say.
        loading: How to load it, as Markdown.
        files: What each file of the folder holds.
    """
    recipe = trained.recipe
    eps = format_pixels(recipe.eps)
    number = f" = {recipe.eps:.6g}" if isinstance(eps, str) else ""
    data_dir = " --data-dir DIR" if recipe.data_dir else ""
    listing = "\n".join(f"- `{name}`: {what}" for name, what in files.items())
    return f"""# [New Model] {publication.name or _to_fill_in("NameYearFirstWordOfTitle")}

## Paper information

- **Paper title**: {publication.name or _to_fill_in("the title")}
- **Paper URL**: {publication.link or _to_fill_in("the address")}
- **Paper authors**: {publication.authors or _to_fill_in("the authors")}
- **Venue**: {publication.venue or _to_fill_in("the venue, or Unpublished")}

## Leaderboard claim

- **Architecture**: {recipe.model}{_in_brackets(recipe.model_options)}, {_parameters(trained):,} parameters
- **Dataset**: {recipe.dataset}{_in_brackets(recipe.dataset_options)}
- **Threat model**: {recipe.norm}
- **eps**: {eps}{number}, on images in [0, 1]
- **Clean accuracy**: {figures.standard or "not measured"}
- **Robust accuracy**: {_robust(figures)}
- **Additional data**: {str(publication.extra_data).lower()}
- **Evaluation method**: {_method(trained, figures)}
- **Checkpoint and code**: this folder; {_to_fill_in("its public address")}

## Model zoo

- [ ] Add the model to the Model Zoo
- [ ] Its architecture is not among RobustBench's own
- [ ] Released under the MIT licence, or under: {_to_fill_in("another licence")}

## Loading

{loading}

Input: images (N, {", ".join(map(str, trained.shape))}) in [0, 1]; normalisation is inside. Output: logits \
(N, {trained.num_classes}). When it was written, what loads from here gave the logits of the trained network.

{listing}

## Training

{_training(trained, figures)} Repeat it with at-smooth {__version__}:

```
at-smooth train --recipe recipe.yaml{data_dir} --out RUN
```
"""


def _robust(figures: Figures) -> str:
    if figures.leaderboard:
        return f"{figures.leaderboard}, by {figures.leaderboard.by}"
    return f"{figures.robust}, by {figures.robust.by}" if figures.robust else "not measured"


def _method(trained: Trained, figures: Figures) -> str:
    command = f"`{evaluate_command(trained, 'RUN')}`"
    if not figures.leaderboard:
        measured = f"{figures.robust.by}, which is weaker than AutoAttack. " if figures.robust else ""
        return f"{measured}AutoAttack was not run on these weights; run {command} and export again"
    if not figures.complete:
        return f"{figures.leaderboard.by}, not in its standard version on the whole test set; run {command}"
    return figures.leaderboard.by


def _training(trained: Trained, figures: Figures) -> str:
    recipe = trained.recipe
    parts = {
        "method": recipe.method,
        "attack": f"{recipe.attack}{_in_brackets(recipe.attack_options)}",
        "regularizer": f"{recipe.regularizer}{_in_brackets(recipe.regularizer_options)}",
        "smoother": f"{recipe.smoother}{_in_brackets(recipe.smoother_options)}",
        "epochs": recipe.epochs,
        "batch size": recipe.batch_size,
        "learning rate": recipe.lr,
        "seed": recipe.seed,
    }
    epoch = f" of epoch {figures.epoch}" if figures.epoch is not None else ""
    which = {"best": ", the best by validation", "final": ", the last"}.get(trained.moment or "", "")
    how = "; ".join(f"{name} {value}" for name, value in parts.items())
    return f"{how}. These are the {trained.weights} weights{epoch}{which}."


def _parameters(trained: Trained) -> int:
    return sum(parameter.numel() for parameter in trained.network.parameters())


def _in_brackets(options: dict[str, Any]) -> str:
    """Options that are set, in words."""
    words = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    return f" ({words})" if words else ""


def _to_fill_in(what: str) -> str:
    return f"(to fill in: {what})"
