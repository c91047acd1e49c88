"""Who is timed: the engine, a plain loop, the bare passes. Each trains on until its watch has seen enough."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from at_smooth.attacks import PGD
from at_smooth.bench.passes import bare_step
from at_smooth.bench.workload import Variant, Workload
from at_smooth.engine import Engine
from at_smooth.experiment import build_engine
from at_smooth.interfaces import Batch
from at_smooth.observer import Observer
from at_smooth.runtime import Runtime, usable_device


class Watch(Protocol):
    """Told of every step; ends a contender by raising an error of its own."""

    def begin(self) -> None:
        """All is built; the first step begins when this returns."""
        ...  # pragma: no cover

    def stepped(self) -> None:
        """A step is done; the next begins when this returns."""
        ...  # pragma: no cover


def engine(workload: Workload, variant: Variant, watch: Watch) -> None:
    """The engine as ``at-smooth train`` runs it: its data, its attack, its update, its checks."""
    device, precision = workload.recipe.device, variant.precision
    runtime = Runtime.choose(device, precision, variant.compile, fast_layers=not variant.direct)
    build_engine(workload.settings, workload.data, runtime).fit(_Told(watch))


class _Told(Observer):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def started(self, engine: Engine) -> None:
        self._watch.begin()

    def stepped(self, engine: Engine) -> None:
        self._watch.stepped()


def plain(workload: Workload, variant: Variant, watch: Watch) -> None:
    """A loop as people write it around torchattacks: float32, torch's own memory layout, the live model attacked.

    Its batches are the engine's, and so is the mode in which BatchNorm is attacked. Whatever the variant.
    """
    recipe, spec = workload.recipe, workload.attack
    device = usable_device(recipe.device)  # torch as it is: nothing is set up for the engine
    model = workload.network().to(device)
    attack = _attack(model, spec)
    if spec.mode == "train":
        attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    model.train()
    watch.begin()
    for batch in _batches(workload):
        images, labels = batch.clean.to(device), batch.labels.to(device)
        perturbed = attack(images, labels)
        loss = F.cross_entropy(model(perturbed), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # what a loop logs
        watch.stepped()


def bare(workload: Workload, variant: Variant, watch: Watch) -> None:
    """The passes that a step needs, by torch's own layers, in the engine's layout and the variant's arithmetic.

    They are of one batch.
    """
    runtime = Runtime.choose(workload.recipe.device, variant.precision, variant.compile)
    model = runtime.compiling(runtime.place(workload.network())).train()
    images, labels = one_batch(workload, runtime.device)
    watch.begin()
    while True:
        bare_step(model, images, labels, workload.attack, runtime)
        watch.stepped()


def one_batch(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,)."""
    batch = next(_batches(workload))
    return batch.clean.to(device), batch.labels.to(device)


def _batches(workload: Workload) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from workload.data.train_batches(epoch, workload.recipe.batch_size)


def _attack(model: torch.nn.Module, spec: PGD) -> Any:
    import torchattacks

    attack = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[spec.threat.norm]
    return attack(model, spec.threat.eps, spec.step_size, spec.steps, spec.random_start)
