"""The generic engine: one step, one epoch, the whole training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from at_smooth.attacks import PGD, Adversary, AttackSpec
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth.data import Data, Part
from at_smooth.divergence import Scene, all_finite, average_diverged
from at_smooth.exceptions import DivergedError
from at_smooth.interfaces import Batch, Method, Regularizer, Schedule, Step, Teachers, Terms, WeightSmoother, total
from at_smooth.modes import kept_modes
from at_smooth.network import try_out
from at_smooth.runtime import Runtime, fenced_randomness, seed_global
from at_smooth.settings import Settings

#: One row of ``metrics.csv``: percent, None where not measured.
Row = dict[str, float | int | None]

#: The columns of a row, in their order.
COLUMNS = [
    *("epoch", "lr", "train_loss", "train_acc"),
    *("val_sa", "val_ra", "test_sa", "test_ra"),
    *("smoothed_val_sa", "smoothed_val_ra", "smoothed_test_sa", "smoothed_test_ra"),
    "seconds",
]

_EVALUATION_BATCH = 512
_LAST = 5  # the paper's Table A7 reports the mean of the last five epochs
_RETRIES = 3  # times that a training goes back and lowers its learning rate, if it may


@dataclass
class Best:
    """The best epoch so far of one kind of weights."""

    score: float = -1.0
    row: Row = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Underway:
    """The epoch in hand: what it takes to go on in the middle of it, and what its row is made of.

    Attributes:
        epoch: Which one, counted from 0.
        lr: Its learning rate.
        loss: Sum over its examples so far, a scalar.
        correct: How many of them were classified correctly under attack, a scalar.
        batches: How many are done.
        stale: Its average moved, and the average's BatchNorm statistics have not been refreshed yet.
        seconds: What it took before an interruption.
    """

    epoch: int
    lr: float
    loss: Tensor
    correct: Tensor
    batches: int = 0
    stale: bool = False
    seconds: float = 0.0

    def figures(self, n: int) -> Row:
        """``lr``, ``train_loss`` and ``train_acc`` (percent, on the attacked images) of an epoch of ``n`` examples."""
        return {"lr": self.lr, "train_loss": self.loss.item() / n, "train_acc": 100 * self.correct.item() / n}


class TrainingLoss(nn.Module):
    """The only place where method, regularizer and student meet; what DistributedDataParallel would wrap.

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

    def forward(self, batch: Batch, perturbed: Tensor, progress: float) -> tuple[Terms, Tensor]:
        """The weighted terms of the loss, and the logits on ``perturbed`` (N, K)."""
        targets = self.regularizer.targets(batch.labels, self.num_classes)
        loss, logits = self.method.loss(self.model, batch.clean, perturbed, targets)
        step = Step(batch.clean, perturbed, batch.labels, batch.indices, logits, loss, progress)
        return self.regularizer.terms(step), logits


class Observer:
    """Told how training goes; the run directory and the progress bar are both such."""

    def started(self, engine: Engine) -> None:
        """Training begins, or continues after a resume."""

    def stepped(self, engine: Engine) -> None:
        """One update is done; between two of them ``engine.state()`` is whole."""

    def measured(self, engine: Engine) -> None:
        """One batch of a measurement, or of the pass for BatchNorm statistics, is done; likewise."""

    def diverged(self, engine: Engine, error: DivergedError) -> None:
        """Something is not finite; training ends here, or goes back to the beginning of the epoch."""

    def epoch_ended(self, engine: Engine, row: Row, improved: list[str]) -> None:
        """One epoch is done and measured; ``improved`` names the weights (raw, smoothed) that are the best so far."""

    def finished(self, engine: Engine) -> None:
        """Training is over."""


class Engine:
    """Adversarial training of any ``nn.Module`` on any images.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K); moved to the runtime's device. Modules that it
            holds in eval mode while itself in train mode stay so.
        data: Training, validation and test images.
        method: Forms the loss and picks the attack.
        attack: The threat and the attack that is wanted; also what RA is measured with.
        regularizer: Smooths the logits; the default does nothing.
        smoother: Smooths the weights; the default does nothing.
        settings: Lengths, rates and measurements; the default is the paper's.
        runtime: Device and precision; the default is the best device, float32.
        teachers: Where the regularizer gets its teachers; the default trains self-teachers on the spot.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        method: Method,
        attack: AttackSpec,
        regularizer: Regularizer | None = None,
        smoother: WeightSmoother | None = None,
        settings: Settings | None = None,
        runtime: Runtime | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        from at_smooth.teachers import TrainedOnTheSpot

        self.settings = settings or Settings()
        self.runtime = runtime or Runtime.choose()
        self.method = method
        self.wanted_attack = attack
        self.regularizer = regularizer or Regularizer()
        self.smoother = smoother or WeightSmoother()
        self.model = self.runtime.place(model)
        if not self.model.training:
            self.model.train()
        self.data = data.to(self.runtime.device)
        self.teachers = teachers or TrainedOnTheSpot(self)

        self.epoch = 0  # trained; those in the history are measured too
        self.step = 0
        self.retries = 0
        self.last_loss = float("nan")
        self.history: list[Row] = []
        self._underway: Underway | None = None
        self._began = 0.0
        self._way_back: dict[str, Any] | None = None
        self._remembered: dict[str, Any] = {}
        self._observers: tuple[Observer, ...] = ()
        self.best = {"raw": Best(), "smoothed": Best()}

        #: What has to stay finite: not a mask, say, that is made of infinities.
        self._watched = {name: value for name, value in self.model.state_dict().items() if all_finite([value])}
        spec = method.attack(attack)
        self._adversary = Adversary(self.model, spec) if spec else None
        self._evaluation = PGD(threat=attack.threat, steps=self.settings.eval_steps, mode="eval")
        self._loss = TrainingLoss(self.model, method, self.regularizer, data.num_classes)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        self.lr_schedule = _lr_scheduler(self.optimizer, self.settings)
        steps, decays = self.data.steps_per_epoch(self.settings.batch_size), self.settings.decays()
        self.schedule = Schedule(self.settings.epochs, steps, decays[0] if decays else None)
        self.smoother.attach(self.model, self.schedule)

    def fit(self, *observers: Observer) -> list[Row]:
        """Train to the end: epoch, measure, log, save.

        Returns:
            The rows of all epochs.

        Raises:
            DivergedError: The loss or a weight is not finite.
        """
        self._observers = observers
        self._prepare()
        self._tell("started")
        while len(self.history) < self.settings.epochs:
            try:
                if self.epoch == len(self.history):  # or else it was interrupted after its last step
                    self.train_epoch(self.epoch)
                self._end_epoch()
            except DivergedError as error:
                self._tell("diverged", error)
                self._go_back(error)
        self._tell("finished")
        return self.history

    def train_epoch(self, epoch: int) -> Row:
        """One pass over the training set (Eq. 1 by the loss, Eq. 2 by the smoother), or the rest of one.

        Returns:
            The epoch's ``lr``, ``train_loss`` and ``train_acc`` (percent, on the attacked images).
        """
        underway = self._underway
        if underway is None or underway.epoch != epoch:
            underway = self._begin_epoch(epoch)
        for batch in self._train_batches(epoch, underway.batches):
            perturbed = self._attack(batch)
            loss, logits = self._update(batch, perturbed)
            self.smoother.after_step(self.model, self.step - 1)
            underway.loss = underway.loss + loss * len(batch.labels)
            underway.correct = underway.correct + (logits.argmax(1) == batch.labels).sum()
            underway.batches += 1
            self._tell("stepped")
        self.lr_schedule.step()
        underway.stale = self.smoother.after_epoch(self.model, epoch)
        self.epoch += 1
        return underway.figures(self.data.train.n)

    def accuracies(self, model: nn.Module, part: Part) -> tuple[float, float]:
        """SA and RA of a model, in percent, in eval mode, float32, on a stream of randomness of their own.

        RA is the accuracy under PGD with ``eval_steps`` steps from a random start (section 3, "Attack Methods").
        """
        adversary = Adversary(model, self._evaluation)
        standard = robust = 0
        with kept_modes(model), fenced_randomness(self.settings.seed, "evaluation"):
            model.eval()
            for batch in part.batches(_EVALUATION_BATCH):
                perturbed = adversary(batch.clean, batch.labels)
                with torch.no_grad():
                    standard += int((model(batch.clean).argmax(1) == batch.labels).sum())
                    robust += int((model(perturbed).argmax(1) == batch.labels).sum())
                self._tell("measured")
        return 100 * standard / part.n, 100 * robust / part.n

    def accuracies_of(self, weights: dict[str, Tensor], part: Part) -> tuple[float, float]:
        """SA and RA of the model with other weights; its own stay."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights)
        return self.accuracies(model, part)

    @property
    def selects_by(self) -> str:
        """What makes an epoch the best: validation RA; validation SA where nothing is attacked."""
        return "val_ra" if self._adversary else "val_sa"

    @property
    def between_epochs(self) -> bool:
        """Whether the weights are those at the end of an epoch that is measured, or the initial ones."""
        return self._underway is None

    @property
    def may_go_back(self) -> bool:
        """Whether a divergence now sends training back to the beginning of its epoch."""
        return self.settings.on_divergence == "retry" and self.retries < _RETRIES

    def where(self) -> str:
        """How far training has come, in words."""
        if self.epoch > len(self.history):
            return f"while epoch {self.epoch} was measured"
        if self._underway and self._underway.batches:
            steps = self.schedule.steps_per_epoch
            return f"in epoch {self.epoch + 1}, after step {self._underway.batches} of {steps}"
        return f"after epoch {self.epoch}"

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to continue exactly, be it between epochs, steps or measured batches."""
        underway = self._underway and {**asdict(self._underway), "seconds": time.perf_counter() - self._began}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "retries": self.retries,
            "underway": underway,
            "way_back": self._way_back if underway else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr_schedule.state_dict(),
            "regularizer": self.regularizer.state(),
            "smoother": self.smoother.state(),
            "history": self.history,
            "best": {name: {"score": best.score, "row": best.row} for name, best in self.best.items()},
        }

    def restore(self, state: dict[str, Any], best_weights: dict[str, dict[str, Tensor]]) -> None:
        """Continue from a state that :meth:`state` gave.

        Args:
            state: The state.
            best_weights: The weights of the best epochs so far, by ``"raw"`` and ``"smoothed"``.
        """
        self.epoch, self.step, self.retries = state["epoch"], state["step"], state["retries"]
        self.history = state["history"]
        self._underway = Underway(**state["underway"]) if state["underway"] else None
        if self._underway:
            self._began = time.perf_counter() - self._underway.seconds
            self._underway.loss = self._underway.loss.to(self.runtime.device)
            self._underway.correct = self._underway.correct.to(self.runtime.device)
        self._way_back = state["way_back"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr"])
        self.smoother.restore(state["smoother"])
        self._remembered = state["regularizer"]  # for after its setup
        for name, best in state["best"].items():
            self.best[name] = Best(best["score"], best["row"], best_weights.get(name, {}))

    def _prepare(self) -> None:
        self._check_logits()
        self.regularizer.setup(self.teachers)
        if self._remembered:
            self.regularizer.restore(self._remembered)
        if self.runtime.compile:
            self.model.compile()

    def _check_logits(self) -> None:
        """Refuse a model whose output is not one logit a class, before it costs anything."""
        batch = next(self.data.train.batches(2))
        with fenced_randomness(self.settings.seed, "check"):
            try_out(self.model, batch.clean, self.data.num_classes)

    def _begin_epoch(self, epoch: int) -> Underway:
        self._began = time.perf_counter()
        self._underway = None
        if self.settings.on_divergence == "retry":
            self._way_back = copy.deepcopy(self.state())
        zero = torch.zeros((), device=self.runtime.device)
        self._underway = Underway(epoch, self.optimizer.param_groups[0]["lr"], zero, zero)
        self.smoother.before_epoch(self.model, epoch)
        return self._underway

    def _end_epoch(self) -> None:
        """Measure what was trained, and tell."""
        underway = cast(Underway, self._underway)  # as train_epoch left it
        if underway.stale:
            self._refresh_smoothed(underway.epoch)
            underway.stale = False
        row = self._measure(underway.figures(self.data.train.n))
        row["seconds"] = round(time.perf_counter() - self._began, 3)
        self.history.append(row)
        self._underway = None
        improved = [weights for weights in self.best if self._improves(weights, row)]
        self._tell("epoch_ended", row, improved)

    def _go_back(self, error: DivergedError) -> None:
        """Begin the epoch again with half the learning rate, if that is wanted and was not done too often."""
        if self._way_back is None or not self.may_go_back:
            raise error
        self.restore(self._way_back, {name: best.weights for name, best in self.best.items()})
        self.regularizer.restore(self._remembered)
        self.retries += 1
        for group in self.optimizer.param_groups:  # the schedule multiplies what is there
            group["lr"] /= 2

    def _train_batches(self, epoch: int, done: int) -> Iterator[Batch]:
        batches = self.data.train_batches(epoch, self.settings.batch_size)
        for batch in islice(batches, done, None):  # those that are done make their draws again
            seed_global(self.settings.seed, self.step, "step")
            yield batch

    def _attack(self, batch: Batch) -> Tensor:
        if self._adversary is None:
            return batch.clean
        with self.runtime.autocast():
            return self._adversary(batch.clean, batch.labels)

    def _update(self, batch: Batch, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        progress = self.step / (self.settings.epochs * self.schedule.steps_per_epoch)
        with self.runtime.autocast():
            terms, logits = self._loss(batch, perturbed, progress)
            loss = total(terms)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.last_loss = loss.item()
        if not (abs(self.last_loss) < float("inf") and all_finite(self._gradients())):
            raise self._divergence(batch, perturbed, logits, terms)
        self.optimizer.step()
        if not all_finite(self._watched.values()):
            raise self._divergence(batch, perturbed, logits, terms)
        self.step += 1
        return loss.detach(), logits.detach()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def _divergence(self, batch: Batch, perturbed: Tensor, logits: Tensor, terms: Terms) -> DivergedError:
        of_epoch = self.step % self.schedule.steps_per_epoch
        lr = self.optimizer.param_groups[0]["lr"]
        precision = self.runtime.precision
        scene = Scene(self.model, self.epoch, of_epoch, lr, precision, batch, perturbed, logits, terms)
        return scene.error()

    def _refresh_smoothed(self, epoch: int) -> None:
        smoothed = self.smoother.smoothed()
        if smoothed is not None:
            with fenced_randomness(self.settings.seed, "batchnorm"):  # dropout must not shift the training's stream
                refresh_batchnorm(smoothed, self._batchnorm_images(epoch), self.model)
            if not all_finite(value for name, value in smoothed.state_dict().items() if name in self._watched):
                raise average_diverged(smoothed, epoch)

    def _batchnorm_images(self, epoch: int) -> Iterator[Tensor]:
        for batch in self.data.train_batches(epoch, self.settings.batch_size, "batchnorm"):
            yield batch.clean
            self._tell("measured")

    def _measure(self, figures: Row) -> Row:
        row: Row = dict.fromkeys(COLUMNS)
        row.update(epoch=self.epoch, **figures)
        every, left = self.settings.test_every, self.settings.epochs - self.epoch
        models = {"": self.model, "smoothed_": self.smoother.smoothed()}
        for prefix, model in models.items():
            if model is None:
                continue
            if self.epoch % self.settings.validate_every == 0 or left == 0:
                row[f"{prefix}val_sa"], row[f"{prefix}val_ra"] = self.accuracies(model, self.data.val)
            if every and self.data.test.n and (self.epoch % every == 0 or left < _LAST):
                row[f"{prefix}test_sa"], row[f"{prefix}test_ra"] = self.accuracies(model, self.data.test)
        return row

    def _improves(self, weights: str, row: Row) -> bool:
        model = self.model if weights == "raw" else self.smoother.smoothed()
        score = row[self.selects_by if weights == "raw" else f"smoothed_{self.selects_by}"]
        if model is None or score is None or score <= self.best[weights].score:
            return False
        kept = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.best[weights] = Best(score, row, kept)
        return True

    def _tell(self, event: str, *news: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(self, *news)


def _lr_scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.decays())
