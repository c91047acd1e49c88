"""One step of adversarial training: attack, loss, gradients, update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from at_smooth.attacks import Adversary
from at_smooth.contracts import check_gradients, check_loss, check_targets, check_terms, settings_kept
from at_smooth.divergence import Scene, all_finite, surely_finite
from at_smooth.interfaces import Batch, Method, Regularizer, Step, Terms, total
from at_smooth.plugin_errors import blamed, described, failures
from at_smooth.runtime import Runtime, fenced_randomness
from at_smooth.scratch import SCRATCH
from at_smooth.shared_loss import shared_among_ranks


class TrainingLoss(nn.Module):
    """The only place where method, regularizer and student meet; what DistributedDataParallel wraps.

    Args:
        model: The student.
        method: Forms the loss.
        regularizer: Chooses its targets and adds its terms.
        num_classes: K.
    """

    def __init__(self, model: nn.Module, method: Method, regularizer: Regularizer, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.regularizer = regularizer
        self.num_classes = num_classes
        self.names = f"{described(method)}, {described(regularizer)}"
        self._checked = False  # what the plugins return, when they are first called

    def forward(self, batch: Batch, perturbed: Tensor, progress: float) -> tuple[Terms, Tensor]:
        """The weighted terms of the loss, and the logits on ``perturbed`` (N, K), detached."""
        n, first, started = len(batch), not self._checked, progress > 0
        with blamed(self.regularizer, "targets"):
            targets = self.regularizer.targets(batch.labels.clone(), self.num_classes)
        if first:
            check_targets(self.regularizer, targets, batch.labels, self.num_classes)
        clean, attacked = _own(batch.clean, perturbed)
        with blamed(self.method, "loss"):
            with settings_kept(self.method, "loss", self.model) if first else nullcontext():
                returned = self.method.loss(self.model, clean, attacked, targets)
            if first:
                check_loss(self.method, returned, n, self.num_classes, started)
            loss, logits = returned
            judged = logits.detach().clone()
        step = Step(*_own(batch.clean, perturbed), batch.labels.clone(), batch.indices.clone(), logits, loss, progress)
        with blamed(self.regularizer, "terms"):
            terms = self.regularizer.terms(step)
        if first:
            check_terms(self.regularizer, terms, loss.detach(), judged, started)
            self._checked = True
        return terms, judged


def _own(clean: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of both images, (N, C, H, W), for a plugin to do with as it likes; one where they are one."""
    own = clean.clone()
    return own, own if perturbed is clean else perturbed.clone()


@dataclass(frozen=True)
class Moment:
    """When a step is taken: epoch and step of the epoch, counted from 0; progress from 0 to 1."""

    epoch: int
    step: int
    progress: float


@dataclass(frozen=True)
class Taken:
    """A step that was taken.

    Attributes:
        loss: Sum over the examples of all ranks, a scalar on the device.
        correct: How many of them were classified correctly under attack, likewise.
        mean_loss: Over the examples.
    """

    loss: Tensor
    correct: Tensor
    mean_loss: float


@dataclass(frozen=True)
class _Piece:
    """A part of the batch, its gradients taken."""

    batch: Batch
    perturbed: Tensor
    terms: Terms
    logits: Tensor
    loss: Tensor


class TrainingStep:
    """Takes steps. The host waits for the device once in each, before the update.

    Args:
        loss: Forms the loss of a batch and its attacked images.
        adversary: Attacks the student; None attacks nothing.
        optimizer: Of the student's parameters.
        runtime: Precision.
        accumulate: In how many pieces a batch is worked on, one after the other; their gradients add up.

    Several ranks take a step together, each on its share of the batch; afterwards the student is the same on all.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        adversary: Adversary | None,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        accumulate: int = 1,
    ) -> None:
        self._loss = loss
        self._adversary = adversary
        self._optimizer = optimizer
        self._runtime = runtime
        self._ranks = runtime.ranks
        self._accumulate = accumulate
        self._learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._shared: DistributedDataParallel | None = None
        self._checked = False

    def __call__(self, batch: Batch, moment: Moment) -> Taken:
        """Perturb the batch, go one step down its loss.

        Raises:
            DivergedError: Loss or gradients are not finite; nothing was updated.
        """
        if self._ranks.count > 1 and self._shared is None:
            with fenced_randomness(0, "trial"):
                self._shared = shared_among_ranks(self._loss, self._loss.model, batch.clean[:2])
        self._optimizer.zero_grad()
        parts = batch.pieces(self._accumulate)
        # torch averages the gradients of ranks, and this one's examples are so many times an even share of the batch
        weight = self._ranks.count * len(batch) / batch.whole if batch.whole else 1
        pieces = [
            self._differentiate(part, weight * len(part) / len(batch), moment, last=part is parts[-1]) for part in parts
        ]
        if not self._checked:
            check_gradients(self._loss.method, self._loss.regularizer, self._learning)
            self._checked = True
        taken = self._judged(batch, pieces, moment)
        self._optimizer.step()
        with torch.no_grad():
            self._ranks.even_out(self._loss.model)
        return taken

    def _differentiate(self, batch: Batch, share: float, moment: Moment, last: bool) -> _Piece:
        """Add this share of the batch's gradients to what is there; with the last piece, those of all ranks."""
        perturbed = self._attack(batch)
        with self._shared.no_sync() if self._shared and not last else nullcontext():
            with self._runtime.autocast(), SCRATCH.kept():  # of teachers, whose layers are faster
                terms, logits = self._form_loss(batch, perturbed, moment.progress)
                with blamed(self._loss.regularizer, "terms"):
                    loss = total(terms)
            with failures(self._loss.names + ": their loss has no gradient"):
                torch.autograd.backward(loss if share == 1 else loss * share)
        detached = {name: value.detach() for name, value in terms.items()}
        return _Piece(batch, perturbed, detached, logits.detach(), loss.detach())

    def _form_loss(self, batch: Batch, perturbed: Tensor, progress: float) -> tuple[Terms, Tensor]:
        if self._shared is None:
            terms, logits = self._loss(batch, perturbed, progress)
        else:
            terms, logits = self._shared(self._loss, batch, perturbed, progress)
        return terms, logits

    def _attack(self, batch: Batch) -> Tensor:
        if self._adversary is None:
            return batch.clean
        with self._runtime.attacking(self._loss.model):
            return self._adversary(batch.clean, batch.labels)

    def _judged(self, batch: Batch, pieces: list[_Piece], moment: Moment) -> Taken:
        """The step's figures, if the loss and the gradients are finite."""
        gradients = [gradient for parameter in self._learning if (gradient := parameter.grad) is not None]
        loss = torch.stack([piece.loss * (len(piece.batch) / len(batch)) for piece in pieces]).sum()
        sound = surely_finite([loss, *gradients])
        correct = torch.stack([(piece.logits.argmax(1) == piece.batch.labels).sum() for piece in pieces]).sum()
        if self._ranks.count > 1:
            share = len(batch) / batch.whole if batch.whole else 1 / self._ranks.count  # all did the same examples
            counted = batch.whole is not None or self._ranks.first
            own = (loss * share, correct * counted, ~sound)
            figures = self._ranks.total(torch.stack([each.double() for each in own]))
            loss, correct, sound = figures[0].to(loss.dtype), figures[1].to(correct.dtype), figures[2] == 0
        value, surely = torch.stack([loss, sound.to(loss.dtype)]).tolist()
        if not surely:
            self._look_closer(pieces, gradients, moment)
        return Taken(loss * (batch.whole or len(batch)), correct, float(value))

    def _look_closer(self, pieces: list[_Piece], gradients: list[Tensor], moment: Moment) -> None:
        """Tell a divergence, of whichever rank, from numbers that are only large."""
        piece = next((piece for piece in pieces if not all_finite([piece.loss])), None)
        broken = piece is not None or not all_finite(gradients)
        if not self._ranks.largest(int(broken)):
            return
        shown = piece or pieces[-1]
        scene = Scene(
            model=self._loss.model,
            epoch=moment.epoch,
            step=moment.step,
            lr=self._optimizer.param_groups[0]["lr"],
            precision=self._runtime.precision,
            batch=shown.batch,
            perturbed=shown.perturbed,
            logits=shown.logits,
            terms=shown.terms,
        )
        witness = self._ranks.largest(0 if piece is None else self._ranks.number)
        raise self._ranks.by(witness, scene.error)
