"""Where and how the arithmetic runs: device, precision, compilation, and every source of randomness."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from at_smooth.exceptions import OptionError


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation of one run.

    Attributes:
        device: Where the model and the data live.
        precision: ``"fp32"``, or ``"bf16"`` for autocast in training; evaluation is always float32.
        compile: Whether training compiles the model (``torch.compile``); pays for large networks.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "fp32", compile: bool = False) -> Runtime:
        """Resolve ``"auto"`` to the best device that is there.

        Raises:
            OptionError: The device does not exist or is not available.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            reason = str(error).splitlines()[0]
            raise OptionError(f"device '{device}' cannot be used ({reason}). Try --device cpu.") from None
        if chosen.type == "cpu":
            # Near-zero losses make denormal numbers, which slow a CPU's arithmetic many times.
            torch.set_flush_denormal(True)
        return cls(chosen, precision, compile)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory layout in which convolutions are fastest."""
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def autocast(self) -> AbstractContextManager[object]:
        """The region of one attack or of one loss. Never nest two: the weight cache would lose gradients."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


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
    torch.manual_seed(_entropy(seed, moment, purpose))


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


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)"
