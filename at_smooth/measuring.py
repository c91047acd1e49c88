"""SA and RA of a model while it trains, and the rows that they are kept in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from at_smooth.attacks import Adversary, AttackSpec
from at_smooth.compilation import Compilation
from at_smooth.data import Part
from at_smooth.modes import kept_modes
from at_smooth.ranks import Ranks
from at_smooth.reading import Source, csv_of
from at_smooth.runtime import full_float32

#: One row of ``metrics.csv``: percent, None where not measured.
Row = dict[str, float | int | None]

#: The columns of a row, in their order.
COLUMNS = [
    *("epoch", "lr", "train_loss", "train_acc"),
    *("val_sa", "val_ra", "test_sa", "test_ra"),
    *("smoothed_val_sa", "smoothed_val_ra", "smoothed_test_sa", "smoothed_test_ra"),
    "seconds",
]


def rows_of(path: Source, text: str) -> list[Row]:
    """The rows of ``metrics.csv``, one an epoch from 1 on.

    Args:
        path: Where the text comes from, for messages.
        text: The whole lines of the file.

    Raises:
        FileError: A row is damaged; the message names its line.
    """
    epochs = itertools.count(1)

    def row(cells: Mapping[str, str]) -> Row:
        if cells["epoch"] != str(epoch := next(epochs)):
            raise ValueError(f"it is of epoch {cells['epoch'][:20]!r}, not {epoch}")
        return {"epoch": epoch, **{name: _figure(name, cells[name]) for name in COLUMNS[1:]}}

    return csv_of(path, text, row)


def check_figure(name: str, value: float | None) -> None:
    """Refuse what no figure of a row can be: None where it was not measured, NaN where it diverged.

    Raises:
        ValueError: An accuracy is no percentage, or another figure is infinite.
    """
    if value is None or math.isnan(value):
        return
    if math.isinf(value) or (name.endswith(("_sa", "_ra", "_acc")) and not 0 <= value <= 100):
        raise ValueError(f"{name} is {value}")


def _figure(name: str, text: str) -> float | None:
    value = float(text) if text else None
    check_figure(name, value)
    return value


def right_answers(
    model: nn.Module,
    part: Part,
    attack: AttackSpec,
    compilation: Compilation,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
    fast_layers: bool = False,
) -> tuple[int, int]:
    """How many images a model gets right, clean and under attack: in eval mode, in float32, not yet a percentage.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K); its modes are as before afterwards.
        part: The examples, on its device.
        attack: What perturbs the images.
        compilation: Says what of it runs compiled.
        batch_size: Images at once, on all ranks together.
        after_batch: Called after each batch, as often on each rank.
        ranks: Who shares each batch; the default is this process alone.
        fast_layers: Whether the attack runs layers in faster forms, and uncompiled: compiled code is no faster in
            eval mode. What it finds is judged by the model as it is.
    """
    ranks = ranks or Ranks()
    adversary = Adversary(model, attack, fast=fast_layers)
    standard = torch.zeros((), dtype=torch.int64, device=part.labels.device)
    robust = standard.clone()
    with kept_modes(model), full_float32(), compilation.nothing():
        model.eval()
        size = min(batch_size, part.n)
        work = None if fast_layers else f"attack on {size}"
        for batch in part.batches(size, ranks):
            if len(batch):
                with compilation.of(work if (batch.whole or len(batch)) == size else None):
                    perturbed = adversary(batch.clean, batch.labels)
                with torch.no_grad():
                    standard += (model(batch.clean).argmax(1) == batch.labels).sum()
                    robust += (model(perturbed).argmax(1) == batch.labels).sum()
            after_batch()
    right = ranks.total(torch.stack([standard, robust])).tolist()
    return right[0], right[1]
