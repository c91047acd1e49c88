"""Evaluators at work: which examples a model still gets right under each, and under all of them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth._version import __version__
from at_smooth.confidence import with_interval
from at_smooth.data import Part, as_float
from at_smooth.exceptions import AtSmoothError, OptionError, PluginError
from at_smooth.interfaces import Evaluator, Outcome, Task, percent
from at_smooth.journal import Journal, Memory, digest, digest_of_model, digest_of_tensors, source_of
from at_smooth.modes import kept_modes
from at_smooth.network import refuse_probabilities
from at_smooth.notes import notify
from at_smooth.own_input import with_own_input
from at_smooth.plugin_class import check_plugin
from at_smooth.plugin_errors import in_words
from at_smooth.runtime import Runtime, fenced_randomness, full_float32
from at_smooth.threat import Threat

#: As many images at once as AutoAttack takes; results that depend on the size of a batch compare at this one.
BATCH_SIZE = 250

#: The result over all evaluators that keep to the radius.
UNION = "union"

#: What a result says of its own; no evaluator's figure has these names.
_RESERVED = {"accuracy", "ci95", "seconds", "broke", "notes", "of", "evaluator", "options"}

_TOLERANCE = 1e-4  # for rounding: of pixels, and as a share of eps
_TRIED = 64  # images on which a model is looked at first


class Watcher:
    """Told how an evaluation goes."""

    def stage_began(self, evaluator: str, stage: str, examples: int) -> None:
        """A stage begins, on so many examples."""

    def batch_done(self, examples: int, accuracy: float | None = None) -> None:
        """So many examples more are done; ``accuracy`` (percent) is what stands so far, of all, where that is known."""

    def evaluator_done(self, evaluator: str, outcome: Outcome) -> None:
        """An evaluator is through."""


@dataclass(frozen=True)
class Evaluation:
    """What several evaluators found on the same examples.

    Attributes:
        threat: What the adversary might do.
        outcomes: One for each evaluator, by the name that the user gave it.
        bounded: The names of those that keep to the threat's radius.
    """

    threat: Threat
    outcomes: Mapping[str, Outcome]
    bounded: tuple[str, ...]

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(next(iter(self.outcomes.values())).broken_by)

    @property
    def union(self) -> Tensor | None:
        """Which examples stand under every evaluator that keeps to the radius, (N,) bool; None for fewer than two."""
        if len(self.bounded) < 2:
            return None
        return torch.stack([self.outcomes[name].standing for name in self.bounded]).all(0)

    def results(self) -> dict[str, dict[str, Any]]:
        """Every figure in plain types: accuracies and their 95 % intervals in percent, lengths in [0, 1] pixels."""
        results: dict[str, dict[str, Any]] = {}
        for name, outcome in self.outcomes.items():
            results[name] = {
                **with_interval(outcome.accuracy, self.n),
                "seconds": round(outcome.seconds, 2),
                **({"broke": outcome.broke} if len(outcome.stages) > 1 else {}),
                **outcome.figures,
                **({"notes": outcome.notes} if outcome.notes else {}),
            }
        if self.union is not None:
            results[UNION] = {**with_interval(percent(self.union), self.n), "seconds": 0.0, "of": list(self.bounded)}
        return results


def evaluate(
    model: nn.Module,
    part: Part,
    evaluators: Mapping[str, Evaluator],
    threat: Threat,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    runtime: Runtime | None = None,
    journal: Journal | None = None,
    watcher: Watcher | None = None,
) -> Evaluation:
    """Find out which examples a model still gets right.

    The model is copied and the global generators are put back, so nothing of the caller's changes; models and
    evaluators get copies of the images. Evaluation is in eval mode and in float32.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K).
        part: Images and labels.
        evaluators: By the names under which their results are wanted.
        threat: What the adversary may do.
        batch_size: Images attacked at once. Attacks that draw noise by the batch give other results at other sizes.
        seed: Decides every random draw, by evaluator, stage and batch.
        runtime: The device; the default is the best there is.
        journal: Remembers finished batches, so that the same call carries on after a kill; None remembers nothing.
        watcher: Told how it goes.

    Raises:
        OptionError: The model gives no logits, or an evaluator cannot work on it.
        PluginError: An evaluator fails.
    """
    if UNION in evaluators:
        raise OptionError(
            f"'{UNION}' is what the worst case over evaluators is called. Give the evaluator another label."
        )
    if not evaluators:
        raise OptionError("there is no evaluator to run. Name one, such as pgd.")
    if batch_size < 1:
        raise OptionError(f"the batch size is {batch_size}; give 1 or more.")
    if part.n == 0:
        raise OptionError("there are no examples to evaluate on.")
    threat.check_shape(tuple(part.images.shape[1:]))
    for evaluator in evaluators.values():
        check_plugin(evaluator)
    device = (runtime or Runtime.choose()).device
    outcomes = {}
    with fenced_randomness(seed, "evaluation"), own_arithmetic(device):
        subject, part = frozen_copy(model).to(device), part.to(device)
        num_classes = classes_of(subject, part)
        for name, evaluator in evaluators.items():
            with _blamed(name, "cannot be checked"):
                evaluator.check(threat, num_classes)
        facts = {
            "version": __version__,
            "model": digest_of_model(subject),
            "logits": digest_of_tensors("", first_logits(subject, part)),  # the weights are not all that a model is
            "examples": digest_of_tensors("", *part),
            "threat": [threat.norm, threat.eps],
            "batch_size": batch_size,
            "seed": seed,
        }
        for name, evaluator in evaluators.items():
            own = {"evaluator": repr(type(evaluator)), "source": source_of(evaluator), "options": evaluator.options()}
            key = digest({**facts, **own, "fingerprint": evaluator.fingerprint()})
            memory = Memory(journal or Journal(None), key)
            trial = _Trial(name, evaluator, part, batch_size, memory, watcher or Watcher())
            outcomes[name] = trial.run(subject, threat, num_classes, seed)
    return Evaluation(threat, outcomes, tuple(name for name, each in evaluators.items() if each.bounded))


@dataclass
class _Trial:
    """One evaluator on one model, from where its journal says that it stood."""

    name: str
    evaluator: Evaluator
    part: Part
    batch_size: int
    memory: Memory
    watcher: Watcher

    def run(self, model: nn.Module, threat: Threat, num_classes: int, seed: int) -> Outcome:
        """All stages: each attacks, batch by batch, what the stages before it left standing."""
        n = self.part.n
        outcome = Outcome([], torch.full((n,), -1), torch.full((n,), float("inf")))
        at_stage, at_batch = self.memory.recall(outcome)
        theirs = with_own_input(copy.deepcopy(model))  # an attack may change what it attacks; we judge by our own
        task = Task(theirs, threat, num_classes, seed, note=lambda text: _once(outcome.notes, text))
        with _blamed(self.name, "cannot name its stages"):
            stages: object = self.evaluator.stages(task)
        names = list(stages) if isinstance(stages, list | tuple) else []
        if not names or len(set(map(repr, names))) < len(names) or not all(isinstance(name, str) for name in names):
            raise PluginError(f"evaluator '{self.name}': stages() should return names, each once, not {stages!r}.")
        outcome.stages = names
        for number, stage in enumerate(outcome.stages):
            if number < at_stage:
                continue
            standing = outcome.standing | (outcome.broken_by >= number)  # before this stage, wherever in it we are
            batches = [batch for batch in torch.split(standing.nonzero().flatten(), self.batch_size) if len(batch)]
            first = at_batch if number == at_stage else 0
            self.watcher.stage_began(self.name, stage, sum(map(len, batches[first:])))
            for position, batch in enumerate(batches[first:], start=first):
                began = time.perf_counter()
                with fenced_randomness(seed, f"{stage}, batch {position}"):
                    broken, distances = self._attack(task, model, stage, batch)
                outcome.broken_by[batch[broken]] = number
                outcome.distances[batch[broken]] = distances[broken]
                outcome.seconds += time.perf_counter() - began
                self.memory.keep(outcome, number, position + 1)
                self.watcher.batch_done(len(batch), outcome.accuracy)
        with _blamed(self.name, "cannot give its figures"):
            outcome.figures = dict(self.evaluator.figures(task, copy.deepcopy(outcome)))
            json.dumps(outcome.figures)
        taken = _RESERVED & set(outcome.figures)
        if taken:
            raise PluginError(f"evaluator '{self.name}' has a figure {', '.join(sorted(taken))}, which is the core's.")
        self.watcher.evaluator_done(self.name, outcome)
        return outcome

    def _attack(self, task: Task, judge: nn.Module, stage: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples of a batch a stage breaks, (N,) bool, and the L2 length of each perturbation, (N,)."""
        chosen = chosen.to(self.part.labels.device)
        images, labels = as_float(self.part.images[chosen]), self.part.labels[chosen]
        with _blamed(self.name, f"failed in its stage '{stage}'"), _as_it_was(task.model):
            returned: object = self.evaluator.perturb(task, stage, images.clone(), labels.clone())
        if not isinstance(returned, Tensor) or returned.shape != images.shape:
            found = f"a tensor {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned).__name__
            raise PluginError(
                f"evaluator '{self.name}': perturb() returned {found} in its stage '{stage}'; it should return the "
                f"perturbed images, a tensor {tuple(images.shape)}."
            )
        perturbed = returned.detach().to(images)
        allowed = self._allowed(images, perturbed, task.threat)
        if not allowed.all():
            task.note("some perturbed images were outside the threat's ball or outside [0, 1]; they do not count")
            perturbed = torch.where(allowed[:, None, None, None], perturbed, images)
        with torch.no_grad():
            logits = judge(perturbed)
        undecided = logits.isnan().any(1)
        if undecided.any():
            task.note("some logits are NaN; those examples count as wrong")
        wrong = (logits.argmax(1) != labels) | undecided
        return wrong.cpu(), (perturbed - images).flatten(1).norm(dim=1).cpu()

    def _allowed(self, images: Tensor, perturbed: Tensor, threat: Threat) -> Tensor:
        lowest, highest = perturbed.flatten(1).amin(1), perturbed.flatten(1).amax(1)
        allowed = (lowest >= -_TOLERANCE) & (highest <= 1 + _TOLERANCE)  # false for NaN too
        if self.evaluator.bounded:
            change = (perturbed - images).flatten(1)
            length = change.abs().amax(1) if threat.norm == "Linf" else change.norm(dim=1)
            allowed &= length <= threat.eps * (1 + _TOLERANCE) + 1e-6
        return allowed


def _once(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


@contextmanager
def _blamed(name: str, doing: str) -> Iterator[None]:
    """What a plugin or the library under it raises is its own failure, not ours."""
    try:
        yield
    except AtSmoothError:
        raise
    except Exception as error:
        raise PluginError(f"evaluator '{name}' {doing} ({in_words(error)}).") from error


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what an attack does to modes, buffers and flags; torchattacks calls ``train()`` on the whole tree."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with kept_modes(model):
        try:
            yield
        finally:
            model.requires_grad_(False)
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Float32 with gradients, whatever the caller's autocast, ``no_grad`` or ``inference_mode`` says."""
    region = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), region, full_float32():
        yield


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32, whose parameters want no gradient, and which leaves its input as it is.

    Raises:
        OptionError: It is no module, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is of type {type(model).__name__}; give a torch.nn.Module.")
    try:
        with torch.no_grad():  # TorchScript would make the copy's parameters results of the model's
            subject = copy.deepcopy(model)
    except Exception as error:  # whatever a model holds that cannot be copied
        raise OptionError(f"the model cannot be copied, as evaluation does to leave it as it is ({error}).") from None
    if isinstance(subject, torch.jit.ScriptModule):  # which has neither hooks nor requires_grad_
        subject = nn.Sequential(subject)
    return with_own_input(subject.float().eval().requires_grad_(False))


def first_logits(model: nn.Module, part: Part) -> Tensor:
    """What a model says of the first few examples.

    Raises:
        OptionError: It fails on them.
    """
    with torch.no_grad():
        return _called(model, as_float(part.images[:_TRIED]))


def _called(model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits: Tensor = model(images)
    except Exception as error:  # anyone's code
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise OptionError(f"the model fails on images {tuple(images.shape)} ({reason}).") from None
    return logits


def classes_of(model: nn.Module, part: Part) -> int:
    """How many classes a model tells apart.

    Raises:
        OptionError: It gives anything but finite logits, or fewer classes than there are labels.
    """
    logits, images = first_logits(model, part), part.images[:_TRIED]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(f"on images {tuple(images.shape)} the model gives {found}; it should give logits (N, K).")
    if not logits.is_floating_point():
        raise OptionError(f"the model gives {logits.dtype}; attacks need logits in floating point.")
    if not logits.isfinite().all():
        raise OptionError(
            "the model's logits are not finite on clean images. Did its weights load, and did it diverge?"
        )
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(logits), device=logits.device), atol=1e-4):
        raise OptionError("the model gives probabilities; attacks need its logits. Leave its last softmax out.")
    with torch.enable_grad():
        refuse_probabilities(_called(model, as_float(images[:2]).requires_grad_().clone()))
    if ((logits >= 0) & (logits <= 1)).all() and (logits != logits[0]).any():
        notify(
            f"the model's outputs all lie in [0, 1] on {len(logits)} images, as those of a sigmoid do. Attacks need "
            f"logits: if it ends in one, leave that out"
        )
    classes = int(logits.shape[1])
    if int(part.labels.max()) >= classes:
        raise OptionError(
            f"the model tells {classes} classes apart, but there is a label {int(part.labels.max())}. "
            f"It was made for another data set."
        )
    return classes
