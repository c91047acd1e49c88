"""Memory that is used again and again, so that it does not scatter over the heap."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory for what a convolution forms on its way, left to the next one; taken anew each time, it lies scattered."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep this thread's memory while the block runs."""
        before = self._kept
        self._kept = {} if before is None else before
        try:
            yield
        finally:
            self._kept = before

    def empty(self, name: str, *size: int) -> Tensor:
        """A tensor of this size, float32 on the CPU, in the memory of the last one of that name if any is kept."""
        if torch.compiler.is_compiling() or self._kept is None:  # compiled code plans its memory itself
            return torch.empty(size, dtype=torch.float32, device="cpu")
        n = math.prod(size)
        if name not in self._kept or self._kept[name].numel() < n:
            self._kept.pop(name, None)  # its memory first, then the larger one
            with torch.inference_mode(False):  # otherwise nobody outside of it could write there
                self._kept[name] = torch.empty(n, dtype=torch.float32, device="cpu")
        return self._kept[name][:n].view(size)


SCRATCH = Scratch()
