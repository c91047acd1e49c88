"""Where and how the arithmetic runs: device, precision, compilation, and every source of randomness."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from at_smooth.allocation import keep_freed_memory
from at_smooth.compilation import compile_in_place
from at_smooth.exceptions import OptionError
from at_smooth.fast_layers import hasten_convolutions
from at_smooth.lowering import Converted, converted_weights
from at_smooth.own_input import with_own_input
from at_smooth.ranks import Ranks


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation of one run.

    Attributes:
        device: Where the model and the data live.
        precision: ``"fp32"``, or ``"bf16"`` for autocast in training; evaluation is always float32.
        compile: Whether training compiles the model (``torch.compile``); pays for large networks.
        ranks: The processes that share the work.
        fast_layers: Whether attacks and teachers run layers in faster forms that are equal up to rounding; they do so
            in float32, and on a CPU alone.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    fast_layers: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "fast_layers", self.fast_layers and self.device.type == "cpu")

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        precision: str = "fp32",
        compile: bool = False,
        ranks: Ranks | None = None,
        fast_layers: bool = True,
    ) -> Runtime:
        """A device that is there, see :func:`usable_device`, and the process set up to be fast on it.

        Raises:
            OptionError: The device does not exist or is not available.
        """
        ranks = ranks or Ranks()
        chosen = usable_device(device, ranks)
        if chosen.type == "cpu":
            for kind in (np.float32, np.float64):
                np.finfo(kind)  # older NumPy looks for the smallest number once, and warns where denormals are gone
            # Near-zero losses make denormal numbers, which slow a CPU's arithmetic many times.
            torch.set_flush_denormal(True)
            keep_freed_memory()
        elif chosen.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            torch.backends.cudnn.benchmark = True  # batches have one size, so the search for the fastest way pays
        return cls(chosen, precision, compile, ranks, fast_layers)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory layout in which convolutions are fastest."""
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def compiling(self, model: nn.Module) -> nn.Module:
        """Let a model compile in place, if that is wanted; its ``state_dict`` keeps its names."""
        if self.compile and model._compiled_call_impl is None:
            compile_in_place(model)
        return model

    def teacher(self, model: nn.Module) -> nn.Module:
        """A model that only gives logits from here on, in eval mode, as fast as it can do so here; it is changed."""
        frozen = self.compiling(with_own_input(self.place(model).requires_grad_(False).eval()))
        if self.precision == "bf16":
            return Converted(frozen, torch.bfloat16).eval()
        if self.fast_layers:
            hasten_convolutions(frozen)
        return frozen

    def autocast(self) -> AbstractContextManager[object]:
        """The region of one attack or of one loss. Never nest two: the weight cache would lose gradients."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def attacking(self, model: nn.Module) -> Iterator[None]:
        """The region of one attack on a model, which does not learn meanwhile."""
        if self.precision == "fp32":
            yield
            return
        with converted_weights(model, torch.bfloat16), self.autocast():
            yield


def usable_device(device: str, ranks: Ranks | None = None) -> torch.device:
    """Resolve ``"auto"`` to the best device that is there; of several ranks each has a GPU of its own.

    Raises:
        OptionError: The device does not exist or is not available.
    """
    ranks = ranks or Ranks()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.count > 1 and device.startswith("cuda"):
        device = _own_gpu(device, ranks)
    try:
        chosen = torch.device(device)
        (torch.ones(1, device=chosen) + 1).item()  # "meta" has tensors and computes nothing
    except Exception as error:  # torch built without CUDA asserts; others lack a module
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        raise OptionError(f"device {device!r} cannot be used ({reason}). Try --device cpu.") from None
    return chosen


def _own_gpu(device: str, ranks: Ranks) -> str:
    """The GPU of this rank."""
    if device != "cuda":
        raise OptionError(f"device '{device}' is one GPU; {ranks.count} processes need one each. Give --device cuda.")
    there = torch.cuda.device_count()
    if 0 < there <= ranks.local:
        raise OptionError(
            f"there is no GPU {ranks.local}: this machine has {there}. Lower --nproc-per-node, or give --device cpu."
        )
    return f"cuda:{ranks.local}"


def _entropy(seed: int, moment: int, purpose: str) -> int:
    state = np.random.SeedSequence([seed, moment, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))  # torch takes seeds below 2**63


def generator(seed: int, moment: int, purpose: str) -> torch.Generator:
    """A generator on the CPU whose stream follows from its arguments alone."""
    return torch.Generator().manual_seed(_entropy(seed, moment, purpose))


def seed_global(seed: int, moment: int, purpose: str) -> None:
    """Seed torch's global generators, which torchattacks and dropout draw from.

    Done before every step, so that what a step draws follows from (seed, step) and a resumed run draws the same.
    """
    entropy = _entropy(seed, moment, purpose)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():  # type: ignore[no-untyped-call]
        torch.manual_seed(entropy)
    else:  # torch's function formats a stack trace for each device that is not there
        torch.default_generator.manual_seed(entropy)


@contextmanager
def fenced_randomness(seed: int, purpose: str) -> Iterator[None]:
    """Run a block on a stream of its own and leave the global generators as they were: torch's, NumPy's, Python's."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        seed_global(seed, 0, purpose)
        np.random.seed(_entropy(seed, 0, purpose) % 2**32)  # some attacks draw from these
        random.seed(_entropy(seed, 0, purpose))
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Run a block on that many CPU threads; None leaves their number. Small networks are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Run a block with algorithms that give the same bits every time; torch's settings are as before afterwards.

    What has no such algorithm raises torch's own error, which names it.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when a process first multiplies on a GPU
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@contextmanager
def full_float32() -> Iterator[None]:
    """Run a block in float32 as it is written: a GPU's convolutions use the shorter TF32 unless told not to."""
    switches: list[tuple[Any, str, Any]]
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9 on; it refuses to mix these with the older switches
        switches = [
            (each, "fp32_precision", "ieee") for each in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
        ]
    else:
        switches = [(each, "allow_tf32", False) for each in (torch.backends.cudnn, torch.backends.cuda.matmul)]
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)"
