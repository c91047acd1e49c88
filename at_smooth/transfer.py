"""Adversarial examples made on one model and judged on others (appendix A1.5; Table A9 and Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.attacks import Adversary, AttackSpec
from at_smooth.confidence import with_interval
from at_smooth.data import Part
from at_smooth.evaluation import BATCH_SIZE, Watcher, classes_of, frozen_copy, own_arithmetic
from at_smooth.exceptions import InputError, OptionError
from at_smooth.interfaces import percent
from at_smooth.runtime import Runtime, fenced_randomness
from at_smooth.subject import Subject

#: The row of the images that nobody attacked.
CLEAN = "clean"


@dataclass(frozen=True)
class Transfer:
    """Who is right on whose adversarial examples.

    Attributes:
        right: By source and target, which examples the target gets right, (N,) bool, on the CPU; the source ``clean``
            stands for the images themselves.
    """

    right: Mapping[str, Mapping[str, Tensor]]

    def results(self) -> dict[str, dict[str, Any]]:
        """Accuracies and their 95 % intervals in percent, by source and target."""
        return {
            source: {target: with_interval(percent(right), len(right)) for target, right in row.items()}
            for source, row in self.right.items()
        }


def transfer(
    models: Mapping[str, nn.Module],
    part: Part,
    attack: AttackSpec,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    runtime: Runtime | None = None,
    watcher: Watcher | None = None,
) -> Transfer:
    """Attack each model and judge the result on every one; nothing of the caller's changes.

    Args:
        models: By name; from images (N, C, H, W) in [0, 1] to logits (N, K).
        part: Images and labels.
        attack: What to attack with, in mode ``eval``.
        batch_size: Images attacked at once.
        seed: Decides every random draw; it is the same for every source.
        runtime: The device; the default is the best there is.
        watcher: Told how it goes.

    Raises:
        OptionError: A model gives no logits, or not those of the same classes.
    """
    if attack.threat.eps == 0:
        raise OptionError("eps is 0, so there is nothing to attack. Give --eps.")
    attack.check_shape(tuple(part.images.shape[1:]))
    device, watcher = (runtime or Runtime.choose()).device, watcher or Watcher()
    with fenced_randomness(seed, "transfer"), own_arithmetic(device):
        part = part.to(device)
        subjects = {name: frozen_copy(model).to(device) for name, model in models.items()}
        if len({classes_of(subject, part) for subject in subjects.values()}) > 1:
            raise OptionError("the models do not tell the same classes apart.")
        right = {CLEAN: _judged(subjects, [batch.clean for batch in part.batches(batch_size)], part.labels)}
        for name, subject in subjects.items():
            adversary = Adversary(subject, attack)
            watcher.stage_began(name, "attack", part.n)
            perturbed = []
            for position, batch in enumerate(part.batches(batch_size)):
                with fenced_randomness(seed, f"batch {position}"):
                    perturbed.append(adversary(batch.clean, batch.labels))
                watcher.batch_done(len(batch.labels))
            right[name] = _judged(subjects, perturbed, part.labels)
    return Transfer(right)


def common_part(subjects: Mapping[str, Subject]) -> Part:
    """The images on which all of them are measured.

    Raises:
        InputError: They do not share them, or not the threat.
    """
    (first_name, first), *others = subjects.items()
    for name, subject in others:
        if subject.threat != first.threat:
            raise InputError(
                f"{first_name} is for {first.threat}, {name} for {subject.threat}. Say which with --norm and --eps."
            )
        same = all(
            one.shape == other.shape and torch.equal(one, other)
            for one, other in zip(first.part, subject.part, strict=True)
        )
        if not same:
            raise InputError(f"{first_name} and {name} are not of the same data. Name a common one with --dataset.")
    return first.part


def _judged(subjects: Mapping[str, nn.Module], batches: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: (torch.cat([subject(batch).argmax(1) for batch in batches]) == labels).cpu()
            for name, subject in subjects.items()
        }
