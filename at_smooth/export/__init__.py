"""Trained networks for others: a folder that stands alone, with weights, definition, figures and a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from at_smooth.exceptions import InputError
from at_smooth.experiment import Weights, Which
from at_smooth.export.card import Publication, card, evaluate_command, model_info
from at_smooth.export.figures import Figures, figures_of
from at_smooth.export.model_file import WEIGHTS, write_model
from at_smooth.export.traced import ONNX, TORCHSCRIPT, write_onnx, write_torchscript
from at_smooth.export.trained import Trained
from at_smooth.files import creating_folder, refuse_taken_folder, usable_path

__all__ = ["FORMATS", "Publication", "default_path", "export"]


@dataclass(frozen=True)
class _Format:
    """A way to write a network.

    Attributes:
        write: Writes its files into a folder, sees that they give the network's logits, and says what they need.
        files: What they are.
        loading: How to load them, in Python.
    """

    write: Callable[[Trained, Path], set[str]]
    files: dict[str, str]
    loading: str


FORMATS = {
    "robustbench": _Format(
        write_model,
        {
            "model.py": "the definition",
            WEIGHTS: "the weights, a state dict",
            "model_info.json": "the leaderboard's fields",
        },
        "from model import load_model\n\nmodel = load_model()",
    ),
    "torchscript": _Format(
        write_torchscript,
        {TORCHSCRIPT: "definition and weights, TorchScript"},
        f'import torch\n\nmodel = torch.jit.load("{TORCHSCRIPT}")',
    ),
    "onnx": _Format(
        write_onnx,
        {ONNX: "definition and weights, ONNX"},
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{ONNX}")\n'
        '[logits] = session.run(None, {"images": images})  # float32, NumPy',
    ),
}


def export(
    source: Path | str,
    out: Path | str,
    format: str = "robustbench",
    *,
    weights: Weights = "reported",
    checkpoint: Which = "final",
    publication: Publication | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a trained network to a folder that loads without at-smooth, with its figures and a card.

    Args:
        source: A run directory, or one of its checkpoint files.
        out: The folder, new or empty.
        format: ``"robustbench"``, ``"torchscript"`` or ``"onnx"``.
        weights: Which weights, as for :func:`at_smooth.load_model`.
        checkpoint: The last epoch, or the best by validation.
        publication: What only the authors know; the card has places to fill in otherwise.
        note: Told what was left out, and what is still missing.

    Returns:
        The folder.

    Raises:
        InputError: ``out`` is taken, or there is no such model.
        ExportError: The model cannot be written in this format, or what was written gives other logits.
        StorageError: A file cannot be written; nothing is left of the folder.
    """
    if format not in FORMATS:
        raise InputError(f"there is no format '{format}'. Formats: {', '.join(FORMATS)}.")
    folder = Path(out)
    refuse_taken_folder(folder)
    trained = Trained.find(usable_path(source), weights, checkpoint)
    figures = figures_of(trained, note)
    with creating_folder(folder) as aside:
        _write(trained, figures, publication or Publication(), FORMATS[format], aside)
    if not figures.complete:
        command = evaluate_command(trained, str(trained.run.path if trained.run else "RUN"))
        note(f"the card lacks AutoAttack on the whole test set: {command}, then export again.")
    return folder


def default_path(source: Path, format: str) -> Path:
    """Where an export goes if nothing is said: into the run's directory, or beside the checkpoint file."""
    return (source if source.is_dir() else source.parent) / f"export-{format}"


def _write(trained: Trained, figures: Figures, publication: Publication, way: _Format, folder: Path) -> None:
    requirements = way.write(trained, folder)
    if "model_info.json" in way.files:
        _write_json(folder / "model_info.json", model_info(trained, figures, publication))
    _write_json(folder / "results.json", figures.to_dict(trained))
    recipe = {**trained.recipe.to_dict(), "data_dir": None}  # where this machine has its data is nobody's business
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    files = {**way.files, "results.json": "every figure", "recipe.yaml": "how it was trained"}
    needs = ", ".join(["torch", *sorted(requirements)] if "onnxruntime" not in requirements else ["onnxruntime"])
    loading = f"In this folder, with {needs} and nothing of at-smooth:\n\n```python\n{way.loading}\n```"
    text = card(trained, figures, publication, loading, files)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
