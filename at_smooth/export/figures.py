"""What is known of a trained network: its run's own measurements, and the evaluations kept beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_smooth.confidence import wilson
from at_smooth.exceptions import FileError
from at_smooth.export.trained import Trained
from at_smooth.reading import json_of
from at_smooth.records import Audit, Evaluation
from at_smooth.threat import format_pixels

#: Under what name the leaderboard's attack is found among results, and what its standard version consists of.
LEADERBOARD_ATTACK = "autoattack"
_STANDARD = {"apgd-ce", "apgd-t", "fab-t", "square"}


@dataclass(frozen=True)
class Accuracy:
    """An accuracy in percent, on how many examples, and by what."""

    percent: float
    n: int | None
    by: str = ""

    def __str__(self) -> str:
        if not self.n:
            return f"{self.percent:.2f} %"
        return "{:.2f} % (95 % interval {:.1f} to {:.1f}, on {:,} images)".format(
            self.percent, *wilson(self.percent, self.n), self.n
        )


@dataclass(frozen=True)
class Figures:
    """What is known of one network.

    Attributes:
        epoch: After which it was saved.
        standard: Accuracy on the test set's own images; None where it was not measured.
        robust: Under the attack that measures during training; likewise.
        leaderboard: Under the leaderboard's attack; None without an evaluation of this network in this threat.
        complete: Whether that is the attack's standard version on the whole test set.
        summary: The run's summary, without the recipe; None for a run that is not finished.
        evaluations: Every evaluation that the run keeps.
    """

    epoch: int | None
    standard: Accuracy | None
    robust: Accuracy | None
    leaderboard: Accuracy | None
    complete: bool
    summary: dict[str, Any] | None
    evaluations: list[dict[str, Any]]

    def to_dict(self, trained: Trained) -> dict[str, Any]:
        """The content of ``results.json``."""
        recipe = trained.recipe
        return {
            "weights": trained.weights,
            "checkpoint": trained.path.name,
            "epoch": self.epoch,
            "threat": {"norm": recipe.norm, "eps": recipe.eps},
            "eps": format_pixels(recipe.eps),
            "test_sa": self.standard and self.standard.percent,
            "test_ra": self.robust and self.robust.percent,
            "test_ra_by": self.robust and self.robust.by,
            "test_examples": self.standard and self.standard.n,
            "summary": self.summary,
            "evaluations": self.evaluations,
        }


def figures_of(trained: Trained, note: Callable[[str], None]) -> Figures:
    """Gather what is known; ``note`` is told of files that cannot be read."""
    summary = trained.run.summary if trained.run and trained.run.finished else None
    n = (summary.get("examples") or {}).get("test") if summary else None
    if summary and trained.moment and summary[trained.weights]:
        block = summary[trained.weights][trained.moment]
        epoch, sa, ra = block["epoch"], block["test_sa"], block["test_ra"]
    else:
        row, prefix = trained.content.get("row") or {}, "smoothed_" if trained.weights == "smoothed" else ""
        epoch, sa, ra = (row.get(name) for name in ("epoch", f"{prefix}test_sa", f"{prefix}test_ra"))
    evaluations = _evaluations(trained.run.path / "evaluations", note) if trained.run else []
    attacked = [each for each in evaluations if _is_of(each, trained) and _result(each)]
    chosen = min(attacked, key=lambda each: (-each["n"], _result(each)["accuracy"]), default=None)
    leaderboard = Accuracy(_result(chosen)["accuracy"], chosen["n"], _attack(_result(chosen))) if chosen else None
    return Figures(
        epoch=epoch,
        standard=None if sa is None else Accuracy(sa, n),
        robust=None if ra is None else Accuracy(ra, n, f"PGD-{trained.recipe.eval_steps}"),
        leaderboard=leaderboard,
        complete=bool(chosen and _is_standard(_result(chosen)) and n in (None, chosen["n"])),
        summary=summary and {name: part for name, part in summary.items() if name != "recipe"},
        evaluations=evaluations,
    )


def _evaluations(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        schema = Audit if path.name.startswith("audit") else Evaluation
        try:
            content = json_of(path)
            if isinstance(content, dict) and content.get("checkpoint") is None:  # of several models, such as a transfer
                continue
            content = json_of(path, schema)
        except FileError as error:
            note(f"left out: {error}")
            continue
        found.append({**content, "checkpoint": Path(content["checkpoint"]).name})  # where it lay is nobody's business
    return found


def _is_of(evaluation: dict[str, Any], trained: Trained) -> bool:
    """Whether an evaluation is of these weights on the test set, within the threat of the training."""
    threat, recipe = evaluation["threat"], trained.recipe
    same_threat = threat["norm"] == recipe.norm and math.isclose(threat["eps"], recipe.eps)
    same_data = evaluation["part"] == "test" and evaluation.get("fingerprint") == trained.content["fingerprint"]
    same_model = (evaluation["checkpoint"], evaluation["weights"]) == (trained.path.name, trained.weights)
    return same_threat and same_data and same_model


def _result(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the leaderboard's attack found, under whatever label."""
    results: list[dict[str, Any]] = list(evaluation["results"].values())
    return next((each for each in results if each.get("evaluator") == LEADERBOARD_ATTACK), {})


def _stages(result: dict[str, Any]) -> list[str]:
    return [stage for stage in result.get("broke") or {} if stage != "clean"]


def _attack(result: dict[str, Any]) -> str:
    details = [str(result["version"])] if "version" in result else []
    details += [", ".join(_stages(result))] if _stages(result) else []
    return f"AutoAttack ({': '.join(details)})" if details else "AutoAttack"


def _is_standard(result: dict[str, Any]) -> bool:
    stages = _stages(result)
    return result.get("version") == "standard" and set(stages) >= _STANDARD
