"""The generic engine: one step, one epoch, the whole training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from at_smooth.attacks import PGD, Adversary, AttackSpec
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth.data import Data, Part
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


@dataclass
class Best:
    """The best epoch so far of one kind of weights."""

    score: float = -1.0
    row: Row = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


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
        """One update is done."""

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

        self.epoch = 0
        self.step = 0
        self.last_loss = float("nan")
        self.history: list[Row] = []
        self._remembered: dict[str, Any] = {}
        self.best = {"raw": Best(), "smoothed": Best()}

        spec = method.attack(attack)
        self._adversary = Adversary(self.model, spec) if spec else None
        self._evaluation = PGD(threat=attack.threat, steps=self.settings.eval_steps, mode="eval")
        self._loss = TrainingLoss(self.model, method, self.regularizer, data.num_classes)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        self._lr = _lr_scheduler(self._optimizer, self.settings)
        steps, decays = self.data.steps_per_epoch(self.settings.batch_size), self.settings.decays()
        self.schedule = Schedule(self.settings.epochs, steps, decays[0] if decays else None)
        self.smoother.attach(self.model, self.schedule)

    def fit(self, *observers: Observer) -> list[Row]:
        """Train to the end: epoch, measure, log, save.

        Returns:
            The rows of all epochs.

        Raises:
            DivergedError: The loss is not finite.
        """
        self._check_logits()
        self.regularizer.setup(self.teachers)
        if self._remembered:
            self.regularizer.restore(self._remembered)
        if self.runtime.compile:
            self.model.compile()
        self._tell("started", observers)
        while self.epoch < self.settings.epochs:
            began = time.perf_counter()
            figures = self.train_epoch(self.epoch, observers)
            self.epoch += 1
            row = self._measure(figures)
            row["seconds"] = round(time.perf_counter() - began, 3)
            self.history.append(row)
            improved = [weights for weights in self.best if self._improves(weights, row)]
            self._tell("epoch_ended", observers, row, improved)
        self._tell("finished", observers)
        return self.history

    def train_epoch(self, epoch: int, observers: tuple[Observer, ...] = ()) -> Row:
        """One pass over the training set (Eq. 1 by the loss, Eq. 2 by the smoother).

        Returns:
            The epoch's ``lr``, ``train_loss`` and ``train_acc`` (percent, on the attacked images).
        """
        lr = self._optimizer.param_groups[0]["lr"]
        loss_sum = correct = torch.zeros((), device=self.runtime.device)
        self.smoother.before_epoch(self.model, epoch)
        for batch in self._train_batches(epoch):
            perturbed = self._attack(batch)
            loss, logits = self._update(batch, perturbed)
            self.smoother.after_step(self.model, self.step - 1)
            loss_sum = loss_sum + loss * len(batch.labels)
            correct = correct + (logits.argmax(1) == batch.labels).sum()
            self._tell("stepped", observers)
        self._lr.step()
        if self.smoother.after_epoch(self.model, epoch):
            self._refresh_smoothed(epoch)
        n = self.data.train.n
        return {"lr": lr, "train_loss": loss_sum.item() / n, "train_acc": 100 * correct.item() / n}

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

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to continue exactly, between two epochs."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "lr": self._lr.state_dict(),
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
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._lr.load_state_dict(state["lr"])
        self.smoother.restore(state["smoother"])
        self._remembered = state["regularizer"]  # for after its setup
        for name, best in state["best"].items():
            self.best[name] = Best(best["score"], best["row"], best_weights.get(name, {}))

    def _check_logits(self) -> None:
        """Refuse a model whose output is not one logit a class, before it costs anything."""
        batch = next(self.data.train.batches(2))
        with fenced_randomness(self.settings.seed, "check"):
            try_out(self.model, batch.clean, self.data.num_classes)

    def _train_batches(self, epoch: int) -> Iterator[Batch]:
        for batch in self.data.train_batches(epoch, self.settings.batch_size):
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
        self.last_loss = loss.item()
        if not abs(self.last_loss) < float("inf"):
            worth = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            raise DivergedError(
                f"the loss is {self.last_loss} at epoch {self.epoch + 1}, step {self.step} ({worth}). "
                f"A lower --lr usually mends this."
            )
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.step += 1
        return loss.detach(), logits.detach()

    def _refresh_smoothed(self, epoch: int) -> None:
        smoothed = self.smoother.smoothed()
        if smoothed is not None:
            batches = self.data.train_batches(epoch, self.settings.batch_size, "batchnorm")
            with fenced_randomness(self.settings.seed, "batchnorm"):  # dropout must not shift the training's stream
                refresh_batchnorm(smoothed, (batch.clean for batch in batches), self.model)

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

    def _tell(self, event: str, observers: tuple[Observer, ...], *news: object) -> None:
        for observer in observers:
            getattr(observer, event)(self, *news)


def _lr_scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.decays())
