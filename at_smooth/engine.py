"""The generic engine: one epoch, the whole training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from at_smooth.attacks import CLEAN, PGD, Adversary, AttackSpec
from at_smooth.batchnorm import refresh_batchnorm
from at_smooth.best import Best
from at_smooth.compilation import Compilation
from at_smooth.contracts import attack_of, check_moved, check_smoothed, settings_kept
from at_smooth.data import Data, Part
from at_smooth.divergence import all_finite, average_diverged, weights_diverged
from at_smooth.exceptions import DivergedError, OptionError
from at_smooth.interfaces import (
    Batch,
    Method,
    Regularizer,
    Schedule,
    Teachers,
    TrainingPlugin,
    WeightSmoother,
)
from at_smooth.measuring import COLUMNS, Row, right_answers
from at_smooth.network import try_out
from at_smooth.observer import Observer
from at_smooth.own_input import own_input
from at_smooth.plugin_class import check_plugin
from at_smooth.plugin_errors import blamed, described, not_the_callers
from at_smooth.plugin_state import FirstEpoch, devices_of, restore, saved_state
from at_smooth.runtime import Runtime, fenced_randomness, seed_global
from at_smooth.settings import Settings
from at_smooth.step import Moment, TrainingLoss, TrainingStep
from at_smooth.underway import Underway

_LAST = 5  # the paper's Table A7 reports the mean of the last five epochs
_SMALL = 2**15  # values of images that any machine takes at once: 512 of 1x8x8
_RETRIES = 3  # times that a training goes back and lowers its learning rate, if it may


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
        for plugin in self._plugins.values():
            check_plugin(plugin)
            self._refuse_memory_of_one_rank(plugin)
        self.model = self.runtime.place(model)
        if not self.model.training:
            self.model.train()
        self.data = data.to(self.runtime.device)
        self.teachers = teachers or TrainedOnTheSpot(self)
        #: What messages call the model.
        self.model_name = "the model"

        self.epoch = 0  # trained; those in the history are measured too
        self.step = 0
        self.retries = 0
        self.last_loss = float("nan")
        self.history: list[Row] = []
        self._underway: Underway | None = None
        self._stale = False  # the average moved, and its BatchNorm statistics have not been refreshed since
        self._began = 0.0
        self._way_back: dict[str, Any] | None = None
        self._remembered: dict[str, Any] | None = None
        self._checked = False  # the plugins, over a first epoch
        self._checked_average = False
        self._observers: tuple[Observer, ...] = ()
        self._compilation = Compilation(self.runtime.compile)
        self.best = {"raw": Best(), "smoothed": Best()}

        #: The average after this epoch, its BatchNorm statistics fresh, where a snapshot of the epoch is due.
        self.snapshot: nn.Module | None = None

        #: What has to stay finite: not a mask, say, that is made of infinities.
        self._watched = {name: value for name, value in self.model.state_dict().items() if all_finite([value])}
        attack.check_shape(self.data.shape)
        training_attack = attack_of(method, attack)
        self._attacks = training_attack is not CLEAN
        self._evaluation = PGD(threat=attack.threat, steps=self.settings.eval_steps, mode="eval")
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not learning:
            raise OptionError("the model has no parameter that learns: requires_grad is False for all of them.")
        self.optimizer = torch.optim.SGD(
            learning,
            self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        self.lr_schedule = _lr_scheduler(self.optimizer, self.settings)
        self._take_step = TrainingStep(
            TrainingLoss(self.model, method, self.regularizer, data.num_classes),
            None if training_attack is CLEAN else Adversary(self.model, training_attack, fast=self.runtime.fast_layers),
            self.optimizer,
            self.runtime,
            self.settings.accumulate,
        )
        #: What makes an epoch the best: validation RA; validation SA where nothing is attacked.
        self.selects_by = "val_ra" if self._attacks else "val_sa"
        steps, decays = self.data.steps_per_epoch(self.settings.batch_size), self.settings.decays()
        self.schedule = Schedule(self.settings.epochs, steps, decays[0] if decays else None)
        with self._calling_smoother("attach"):
            self.smoother.attach(self.model, self.schedule)

    def fit(self, *observers: Observer) -> list[Row]:
        """Train to the end: epoch, measure, log, save.

        Returns:
            The rows of all epochs.

        Raises:
            DivergedError: The loss or a weight is not finite.
        """
        self._observers = observers
        with not_the_callers():
            self._prepare()
            with self._compilation.nothing():
                self._fit()
        return self.history

    def _fit(self) -> None:
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

    def train_epoch(self, epoch: int) -> Row:
        """One pass over the training set (Eq. 1 by the loss, Eq. 2 by the smoother), or the rest of one.

        Returns:
            The epoch's ``lr``, ``train_loss`` and ``train_acc`` (percent, on the attacked images).
        """
        first_epoch = None if self._checked else FirstEpoch(self._plugins.values(), self.model)
        underway = self._underway
        if underway is None or underway.epoch != epoch:
            underway = self._begin_epoch(epoch)
        with own_input(self.model):
            self._take_steps(epoch, underway)
        self._refuse_unsound()
        self.lr_schedule.step()
        self._stale = self._after_epoch(epoch) or self._stale
        self.epoch += 1
        if first_epoch:
            first_epoch.check(self.runtime.device)
            self._checked = True
        return underway.figures(self.data.train.n)

    def _take_steps(self, epoch: int, underway: Underway) -> None:
        """The epoch's steps that are left."""
        full = min(self.settings.batch_size, self.data.train.n)
        for batch in self._train_batches(epoch, underway.batches):
            with self._compilation.of("step" if (batch.whole or len(batch)) == full else None):
                taken = self._take_step(batch, self._moment())
            self.last_loss = taken.mean_loss
            with self._calling_smoother("after_step", once_an_epoch=underway.batches == 0):
                self.smoother.after_step(self.model, self.step)
            self.step += 1
            underway.add(taken)
            self._tell("stepped")

    def _after_epoch(self, epoch: int) -> bool:
        """Tell the smoother, and say whether its average moved."""
        with self._calling_smoother("after_epoch"):
            moved = check_moved(self.smoother, self.smoother.after_epoch(self.model, epoch))
        with blamed(self.smoother, "smoothed"):
            smoothed: object = self.smoother.smoothed()
        if smoothed is not None and not self._checked_average:
            check_smoothed(self.smoother, smoothed, self.model)
            self._checked_average = True
        return moved

    @contextmanager
    def _calling_smoother(self, method: str, once_an_epoch: bool = True) -> Iterator[None]:
        """The region of a call, whose failures are the smoother's; in each step it is not looked at what it changes."""
        with blamed(self.smoother, method):
            if not once_an_epoch:
                yield
                return
            with settings_kept(self.smoother, method, self.model):
                yield

    def accuracies(self, model: nn.Module, part: Part) -> tuple[float, float]:
        """SA and RA of a model, in percent, in eval mode, float32, on a stream of randomness of their own.

        RA is the accuracy under PGD with ``eval_steps`` steps from a random start (section 3, "Attack Methods").
        """
        ranks = self.runtime.ranks
        with fenced_randomness(self.settings.seed, ranks.stream("evaluation")):
            right = right_answers(
                self.runtime.compiling(model),
                part,
                self._evaluation,
                self._compilation,
                self._measured_at_once(),
                lambda: self._tell("measured"),
                ranks,
                self.runtime.fast_layers,
            )
        return 100 * right[0] / part.n, 100 * right[1] / part.n

    def accuracies_of(self, weights: dict[str, Tensor], part: Part) -> tuple[float, float]:
        """SA and RA of the model with other weights; its own stay."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights)
        return self.accuracies(model, part)

    @property
    def between_epochs(self) -> bool:
        """Whether the weights are those at the end of an epoch that is measured, or the initial ones."""
        return self._underway is None

    @property
    def snapshot_due(self) -> bool:
        """Whether a snapshot is kept of the epoch that was trained last."""
        every = self.settings.keep_checkpoints
        return bool(every) and self.epoch % every == 0

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
        """All that :meth:`restore` needs to continue exactly, be it between epochs, steps or measured batches.

        Raises:
            DivergedError: A weight is not finite, so that there is nothing to go on from.
        """
        self._refuse_unsound()
        underway = self._underway and {**asdict(self._underway), "seconds": time.perf_counter() - self._began}
        remembered = {name: saved_state(plugin) for name, plugin in self._plugins.items()}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "retries": self.retries,
            "underway": underway,
            "stale": self._stale,
            "way_back": self._way_back if underway else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr_schedule.state_dict(),
            **remembered,
            "elsewhere": {name: devices_of(state) for name, state in remembered.items()},
            "history": [dict(row) for row in self.history],
            "best": {name: {"score": best.score, "row": dict(best.row)} for name, best in self.best.items()},
        }

    def restore(self, state: dict[str, Any], best_weights: dict[str, dict[str, Tensor]]) -> None:
        """Continue from a state that :meth:`state` gave.

        Args:
            state: The state.
            best_weights: The weights of the best epochs so far, by ``"raw"`` and ``"smoothed"``.
        """
        self.epoch, self.step, self.retries = state["epoch"], state["step"], state["retries"]
        self.history = [dict(row) for row in state["history"]]
        self._stale = state["stale"]
        self._underway = Underway(**state["underway"]) if state["underway"] else None
        if self._underway:
            self._began = time.perf_counter() - self._underway.seconds
            self._underway.loss = self._underway.loss.to(self.runtime.device)
            self._underway.correct = self._underway.correct.to(self.runtime.device)
        self._way_back = state["way_back"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr"])
        for name in ("method", "smoother"):
            self._restore_plugin(name, state)
        self._remembered = {name: state[name] for name in ("regularizer", "elsewhere")}  # for after its setup
        for name, best in state["best"].items():
            self.best[name] = Best(best["score"], dict(best["row"]), best_weights.get(name, {}))

    @property
    def _plugins(self) -> dict[str, TrainingPlugin]:
        return {"method": self.method, "regularizer": self.regularizer, "smoother": self.smoother}

    def _prepare(self) -> None:
        self._check_logits()
        with blamed(self.regularizer, "setup"):
            self.regularizer.setup(self.teachers)
        self._restore_regularizer()
        self.runtime.compiling(self.model)

    def _restore_plugin(self, name: str, state: dict[str, Any]) -> None:
        restore(self._plugins[name], state[name], state["elsewhere"][name], self.runtime.device)

    def _restore_regularizer(self) -> None:
        if self._remembered:
            with blamed(self.regularizer, "restore"):
                self._restore_plugin("regularizer", self._remembered)
        self._remembered = None

    def _refuse_memory_of_one_rank(self, plugin: TrainingPlugin) -> None:
        remembers = type(plugin).state is not TrainingPlugin.state
        if self.runtime.ranks.count > 1 and remembers and not plugin.same_on_all_ranks:
            raise OptionError(
                f"{described(plugin)} remembers what it saw, and each of several ranks sees other examples. Train in "
                f"one process; its author can say that it need not (same_on_all_ranks)."
            )

    def _check_logits(self) -> None:
        """Refuse a model that gives other than one logit a class, or cannot be attacked, before it costs anything."""
        batch = next(self.data.train.batches(2))
        with fenced_randomness(self.settings.seed, "check"):
            attacked = self._attacks or (self.settings.eval_steps > 0 and self.wanted_attack.threat.eps > 0)
            try_out(self.model, batch.clean, self.data.num_classes, attacked=attacked, name=self.model_name)

    def _begin_epoch(self, epoch: int) -> Underway:
        self._began = time.perf_counter()
        self._underway = None
        if self.settings.on_divergence == "retry":
            self._way_back = copy.deepcopy(self.state())
        zero = torch.zeros((), device=self.runtime.device)
        self._underway = Underway(epoch, self.optimizer.param_groups[0]["lr"], zero, zero)
        with self._calling_smoother("before_epoch"):
            self.smoother.before_epoch(self.model, epoch)
        return self._underway

    def _end_epoch(self) -> None:
        """Measure what was trained, and tell."""
        underway = cast(Underway, self._underway)  # as train_epoch left it
        if self._stale and (self._due() or self.smoother.reads_statistics):
            self._refresh(self.smoother.smoothed(), underway.epoch)
            self._stale = False
        self.snapshot = self._snapshot(underway.epoch)
        row = self._measure(underway.figures(self.data.train.n))
        row["seconds"] = round(time.perf_counter() - self._began, 3)
        self.history.append(row)
        self._underway = None
        improved = [weights for weights in self.best if self._offer(weights, row)]
        self._tell("epoch_ended", row, improved)
        self.snapshot = None  # which may be a copy

    def _go_back(self, error: DivergedError) -> None:
        """Begin the epoch again with half the learning rate, if that is wanted and was not done too often."""
        start = self._way_back
        if start is None or not self.may_go_back:
            raise error
        self.restore(start, {name: best.weights for name, best in self.best.items()})
        self._restore_regularizer()
        self.retries += 1
        for group in self.optimizer.param_groups:  # the schedule multiplies what is there
            group["lr"] /= 2

    def _train_batches(self, epoch: int, done: int) -> Iterator[Batch]:
        ranks = self.runtime.ranks
        batches = self.data.train_batches(epoch, self.settings.batch_size, sharing=ranks.share)
        for batch in islice(batches, done, None):  # those that are done make their draws again
            seed_global(self.settings.seed, self.step, ranks.stream("step"))
            yield batch

    def _moment(self) -> Moment:
        steps = self.schedule.steps_per_epoch
        return Moment(self.epoch, self.step % steps, self.step / (self.settings.epochs * steps))

    def _refuse_unsound(self) -> None:
        """Refuse weights that an update made infinite; the step itself sees only loss and gradients."""
        if not all_finite(self._watched.values()):
            raise weights_diverged(self.model, self.epoch, self.optimizer.param_groups[0]["lr"])

    def _refresh(self, smoothed: nn.Module | None, epoch: int) -> None:
        """Refresh the BatchNorm statistics of the average, or of a copy, after an epoch, counted from 0."""
        if smoothed is not None:
            with fenced_randomness(self.settings.seed, "batchnorm"):  # dropout must not shift the training's stream
                refresh_batchnorm(smoothed, self._batchnorm_images(epoch), self.model, self.runtime.ranks)
            if not all_finite(value for name, value in smoothed.state_dict().items() if name in self._watched):
                raise average_diverged(smoothed, epoch)

    def _snapshot(self, epoch: int) -> nn.Module | None:
        """The average as a snapshot keeps it; None where none is due, or there is no average yet.

        Where the average was not refreshed to be measured, that is done to a copy: later epochs find it as it would be
        without the snapshot.
        """
        smoothed = self.smoother.smoothed() if self.snapshot_due else None
        if smoothed is not None and self._stale:
            smoothed = copy.deepcopy(smoothed)
            self._refresh(smoothed, epoch)
        return smoothed

    def _batchnorm_images(self, epoch: int) -> Iterator[Tensor]:
        """The batches that are this rank's; each round of all ranks is told of once on each."""
        ranks, last = self.runtime.ranks, self.schedule.steps_per_epoch - 1
        batches = self.data.train_batches(epoch, self.settings.batch_size, "batchnorm", ranks.turn)
        for number, batch in enumerate(batches):
            if len(batch):
                yield batch.clean
            if (number + 1) % ranks.count == 0 or number == last:
                self._tell("measured")

    def _measure(self, figures: Row) -> Row:
        row: Row = dict.fromkeys(COLUMNS)
        row.update(epoch=self.epoch, **figures)
        models = {"": self.model, "smoothed_": self.smoother.smoothed()}
        for prefix, model in models.items():
            if model is None:
                continue
            for part in self._due():
                row[f"{prefix}{part}_sa"], row[f"{prefix}{part}_ra"] = self.accuracies(model, getattr(self.data, part))
        return row

    def _due(self) -> list[str]:
        """Which parts of the data are measured after this epoch."""
        every, left = self.settings.test_every, self.settings.epochs - self.epoch
        due = ["val"] if self.epoch % self.settings.validate_every == 0 or left == 0 else []
        testing = every and self.data.test.n and (self.epoch % every == 0 or left < _LAST)
        return [*due, "test"] if testing else due

    def _measured_at_once(self) -> int:
        """What fits in training fits here; of small images more do, and one by one they would take longer."""
        in_training = math.ceil(self.settings.batch_size / self.settings.accumulate)
        return max(in_training, _SMALL // math.prod(self.data.shape))

    def _offer(self, weights: str, row: Row) -> bool:
        model = self.model if weights == "raw" else self.smoother.smoothed()
        score = row[self.selects_by if weights == "raw" else f"smoothed_{self.selects_by}"]
        return model is not None and self.best[weights].offer(score, row, model)

    def _tell(self, event: str, *news: object) -> None:
        for observer in self._observers:
            own = (copy.copy(each) if isinstance(each, dict | list) else each for each in news)  # theirs to change
            getattr(observer, event)(self, *own)


def _lr_scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.decays())
