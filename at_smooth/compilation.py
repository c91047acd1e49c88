"""How a model compiles, and which work runs compiled: that of full batches, each kind of it compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from at_smooth.exceptions import OptionError

#: How many compiled forms of one piece of code torch keeps; all networks share them.
_FORMS = 256


class Compilation:
    """Compiles a model for work that repeats, and for nothing else.

    torch compiles a model again for each batch size, mode and set of parameters that learn. A last batch that is
    smaller, or a pass that comes once an epoch, would take longer to compile than it ever takes to run, so it runs as
    it is. ``torch.compiler.set_stance`` says so.

    Args:
        wanted: Otherwise nothing is compiled.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._done: set[str] = set()

    @contextmanager
    def nothing(self) -> Iterator[None]:
        """Let nothing compile while the block runs, but for what :meth:`of` marks in it."""
        with _stance("force_eager") if self._wanted else nullcontext():
            yield

    @contextmanager
    def of(self, work: str | None) -> Iterator[None]:
        """The region of one batch.

        Args:
            work: A name for what is done to full batches, compiled where it first comes; None for any other work.

        Raises:
            OptionError: It cannot be compiled: there is no C++ compiler, say.
        """
        if not self._wanted or work is None:
            yield
            return
        with _stance("eager_on_recompile" if work in self._done else "default"):
            try:
                yield
            except Exception as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
                raise OptionError(f"the model cannot be compiled here ({reason}). Leave --compile out.") from None
        self._done.add(work)


def compile_in_place(model: nn.Module) -> None:
    """Let a model compile when it is called; its ``state_dict`` keeps its names.

    As ``nn.Module.compile``, which before torch 2.13 passes over what begins in torch's own code, such as an
    ``nn.Sequential``. Hence a function of ours around it.
    """
    call = model._call_impl

    def called(*arguments: Any, **named: Any) -> Any:
        return call(*arguments, **named)  # type: ignore[no-untyped-call]

    model._compiled_call_impl = torch.compile(called, dynamic=False)


@contextmanager
def _stance(name: Any) -> Iterator[None]:
    import torch._dynamo.config as config

    before = config.cache_size_limit
    config.cache_size_limit = max(before, _FORMS)
    try:
        with cast(AbstractContextManager[Any], torch.compiler.set_stance(name)):
            yield
    finally:
        config.cache_size_limit = before
