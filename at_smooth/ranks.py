"""The processes of one training (ranks), and the few things that they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from at_smooth.exceptions import AtSmoothError

_T = TypeVar("_T")


class Share(NamedTuple):
    """What one rank does of ``whole`` examples: those from ``start`` up to ``stop``."""

    start: int
    stop: int
    whole: int

    def of(self, tensor: Tensor) -> Tensor:
        """These of all examples, (whole, ...)."""
        return tensor[self.start : self.stop]


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training. Of one process alone, nothing here does anything.

    What has to be called by all ranks, in the same order, says "together".

    Attributes:
        number: This one, from 0; the first reads, writes and prints.
        count: How many there are.
        local: This one among those of its machine, from 0: the number of its GPU.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """The ranks of torch.distributed's process group; one, where there is no group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        number = dist.get_rank()
        return cls(number, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", number)))

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads, writes and prints."""
        return self.number == 0

    def stream(self, purpose: str) -> str:
        """What randomness is for, by another name on each rank but the first."""
        return purpose if self.first else f"{purpose}, rank {self.number}"

    def share(self, n: int, number: int = 0) -> Share:
        """This rank's part of a batch of ``n``; all of it where a rank would have fewer than two examples.

        BatchNorm needs two, and the steps of an epoch must not depend on how many ranks there are.
        """
        return self.part(n) if n >= 2 * self.count else Share(0, n, n)

    def part(self, n: int) -> Share:
        """This rank's part of ``n`` examples, none perhaps; the parts differ by one at most."""
        size, more = divmod(n, self.count)
        start = self.number * size + min(self.number, more)
        return Share(start, start + size + (self.number < more), n)

    def turn(self, n: int, number: int) -> Share:
        """All of every ``count``-th batch, by its number from 0, and nothing of the others."""
        return Share(0, n if number % self.count == self.number else 0, n)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, together; the same bits on each."""
        if self.count == 1:
            return numbers
        numbers = numbers.clone()
        dist.all_reduce(numbers, group=_control_group() if numbers.device.type == "cpu" else None)
        return numbers

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, together. No GPU is waited for."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_control_group())
        return int(numbers)

    def by_first(self, function: Callable[[], _T]) -> _T:
        """What a function gives on the first rank, which alone calls it; together.

        Raises:
            AtSmoothError: The function raised it; then every rank does.
        """
        return self.by(0, function)

    def by(self, number: int, function: Callable[[], _T]) -> _T:
        """The same by another rank."""
        if self.count == 1:
            return function()
        news: list[Any] = [None]
        if self.number == number:
            try:
                news = [(function(), None)]
            except AtSmoothError as error:
                news = [(None, error)]
        dist.broadcast_object_list(news, number, group=_control_group(), device=torch.device("cpu"))
        result, refusal = news[0]
        if refusal is not None:
            raise refusal
        return result  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Go on when all have come here, together."""
        self.largest(0)

    @contextmanager
    def held_by_first(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Enter a context on the first rank alone; what keeps it out keeps all out."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(context)

            self.by_first(enter)
            yield

    def even_out(self, model: nn.Module, weight: float = 1.0) -> None:
        """Make the buffers that each rank moved on its own the same again, together.

        BatchNorm's running statistics become their mean, all others those of the first rank. A buffer that was the
        same everywhere keeps its bits: the mean is formed in double precision.

        Args:
            model: Its parameters are the same everywhere already.
            weight: Of this rank's statistics.
        """
        if self.count == 1:
            return
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        own = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
        if own:
            flat = torch.cat([each.double() for each in own]) * weight
            flat = self.total(torch.cat([flat, flat.new_tensor([weight])]))
            means = torch.split(flat[:-1] / flat[-1], [each.numel() for each in own])
            for each, mean in zip(own, means, strict=True):
                each.copy_(mean)
        averaged = {id(each) for each in own}
        saved = model.state_dict(keep_vars=True)
        others = [each for name, each in model.named_buffers() if name in saved and id(each) not in averaged]
        for kind in sorted({each.dtype for each in others}, key=str):
            same = [each for each in others if each.dtype == kind]
            flat = torch.cat([each.flatten() for each in same])
            dist.broadcast(flat, 0, group=_control_group() if flat.device.type == "cpu" else None)
            for each, first in zip(same, torch.split(flat, [each.numel() for each in same]), strict=True):
                each.copy_(first.view_as(each))


#: By the group that they stand beside, which must be free to go when it is destroyed.
_control_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _control_group() -> Any:
    """Where what is on the CPU is exchanged: the group itself, or one of gloo's beside a user's group of NCCL's."""
    group = dist.group.WORLD
    if group not in _control_groups:
        _control_groups[group] = None if "gloo" in dist.get_backend_config(group) else dist.new_group(backend="gloo")
    return _control_groups[group]
