"""Failures of plugins, in messages that name the plugin, its method and the line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydantic
import torch

from at_smooth import interfaces
from at_smooth.exceptions import AtSmoothError, PluginError
from at_smooth.interfaces import Plugin

_KINDS: dict[type[Plugin], str] = {
    interfaces.Method: "method",
    interfaces.Regularizer: "regularizer",
    interfaces.WeightSmoother: "smoother",
    interfaces.Evaluator: "evaluator",
    interfaces.Dataset: "data set",
    interfaces.Architecture: "model",
    interfaces.Analysis: "analysis",
}
_LIBRARIES = tuple(str(Path(library.__file__ or "").parent) for library in (torch, np, pydantic))


def described(plugin: Plugin | type[Plugin]) -> str:
    """A plugin in words, as in ``regularizer TemporalEnsembling``."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{_KINDS[interface_of(cls)]} {cls.__name__}"


def interface_of(cls: type) -> type[Plugin]:
    """Which interface a class derives from, or is."""
    return next(interface for interface in _KINDS if issubclass(cls, interface))


@contextmanager
def blamed(plugin: Plugin, method: str) -> Iterator[None]:
    """Turn whatever a plugin's method raises into an error that names both, and the line.

    Raises:
        PluginError: The block failed; its cause is the exception itself.
    """
    with failures(f"{described(plugin)} fails in {method}()"):
        yield


@contextmanager
def failures(beginning: str) -> Iterator[None]:
    """Turn whatever fails in the block into one message.

    Args:
        beginning: Of the message: which plugins' doing it is.

    Raises:
        PluginError: The block failed; its cause is the exception itself.
    """
    try:
        yield
    except Exception as error:
        if not _is_plugins(error):
            raise
        raise PluginError(f"{beginning}: {in_words(error)}.") from error


@contextmanager
def not_the_callers() -> Iterator[None]:
    """What fails in the block is no fault of the plugin that called for it, such as a regularizer for its teacher."""
    try:
        yield
    except Exception as error:
        error.__dict__["not_the_callers"] = True
        raise


def in_words(error: BaseException) -> str:
    """An exception's kind, what it says, and the line of the author's that it comes from."""
    if isinstance(error, pydantic.ValidationError) and error.errors()[0]["type"] == "frozen_instance":
        name = ".".join(map(str, error.errors()[0]["loc"]))
        said = (
            f"it sets '{name}', and public attributes are options, which do not change. Declare a private one, "
            f"_{name}: Any = PrivateAttr(default=None), and set self._{name}"
        )
    else:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:500]}" if str(error) else type(error).__name__
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_LIBRARIES)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _is_plugins(error: Exception) -> bool:
    if isinstance(error, AtSmoothError | torch.OutOfMemoryError | torch.distributed.DistError):
        return False
    lost = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return not (lost or compiler or "not_the_callers" in error.__dict__)
