"""How much memory this process takes, and took at most."""

from __future__ import annotations

from pathlib import Path

import torch

_MB = 1e6


class Memory:
    """The memory of this process since a moment; on a GPU, of its tensors there.

    On Linux the figures are the kernel's resident set, ``VmRSS`` and ``VmHWM``. ``ru_maxrss`` would not do: a process
    starts with its parent's. What compiling takes counts too, so compiled contenders are not reported.

    Args:
        device: Where the contender works.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._now()

    def figures(self) -> dict[str, float | None]:
        """``peak_mb``, the most that was taken so far, and ``rise_mb``, how much of it came after the beginning.

        Megabytes of 10^6 bytes; None where the system does not say.
        """
        peak = self._peak()
        rise = None if peak is None or self._before is None else peak - self._before
        return {"peak_mb": peak, "rise_mb": rise}

    def _now(self) -> float | None:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / _MB
        return _status("VmRSS")

    def _peak(self) -> float | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _MB
        return _status("VmHWM")


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / _MB  # in kB, by which the kernel means 1024 bytes
    return None
