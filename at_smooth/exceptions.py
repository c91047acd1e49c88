"""Every error that at-smooth raises on purpose, in one family.

A message says what is wrong and what to do next. Only ``cli.py`` ends with their exit codes.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class AtSmoothError(Exception):
    """Base of the family."""

    exit_code = 1

    #: Whether the message says what is left of a run that broke off.
    complete = False

    def add(self, sentence: str) -> None:
        """Say more."""
        self.args = (f"{self} {sentence}", *self.args[1:])


class InputError(AtSmoothError):
    """Something that the user gave cannot be used."""

    exit_code = 2


class PluginError(InputError):
    """A plugin is unknown, ambiguous or broken."""


class UntrustedError(PluginError):
    """A file names code that the user has not trusted; it was not imported."""


class OptionError(InputError):
    """An option is unknown, of the wrong type or out of bounds."""


class DataError(InputError):
    """A data set is missing, unreadable or holds what it must not."""


class FileError(InputError):
    """A file cannot be read, or does not hold what it should."""


class TakenError(InputError):
    """Something is there already where a new file or folder was to be."""


class CheckpointError(InputError):
    """A checkpoint is missing, unreadable or does not fit."""


class RunError(InputError):
    """A run directory is missing, taken or does not fit."""


class ExportError(InputError):
    """A model cannot be exported as it was asked for."""


class BenchError(AtSmoothError):
    """A contender of a benchmark ended before it was done."""

    exit_code = 2


class StorageError(AtSmoothError):
    """A file could not be written; what was there before stands."""

    exit_code = 2


class RunDirectoryGoneError(StorageError):
    """A run directory was moved or deleted while it was trained; the message says how to go on."""


class DivergedError(AtSmoothError):
    """Training produced a loss or a weight that is not finite.

    Args:
        message: Where, what, and the likely cause.
        dump: What diverged, as tensors and plain values.
    """

    exit_code = 3

    def __init__(self, message: str, dump: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.dump = dump or {}


class RankLostError(AtSmoothError):
    """Another process of a training on several died, or no longer answers; the last good checkpoint stands."""

    exit_code = 5


class MaskedGradientsError(AtSmoothError):
    """An audit found that a model's robustness is not what it seems."""

    exit_code = 4


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop; no ``except Exception`` takes it for a failure.

    Args:
        signal_number: Of SIGINT or SIGTERM.
        message: Where it stopped.
        saved: Whether a run was saved at that very moment.
    """

    def __init__(self, signal_number: int, message: str, saved: bool = False) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.saved = saved

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + self.signal_number

    @property
    def name(self) -> str:
        """The signal's name, as in ``SIGINT``."""
        return signal.Signals(self.signal_number).name


def interruptions(error: BaseException | None) -> list[Interrupted]:
    """The interruptions that an error is, or came in the middle of, the newest first."""
    found = []
    while error is not None:
        found += [error] if isinstance(error, Interrupted) else []
        error = error.__context__
    return found


def explain(error: ValidationError, subject: str) -> OptionError:
    """Turn pydantic's report into one message that names each offending field.

    Args:
        error: What pydantic raised.
        subject: What was being read, as in ``"recipe"`` or ``"regularizer kd-std-adv"``.
    """
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field or repr(field)}: there is no such option")
        elif problem["type"] == "missing":
            lines.append(f"{field}: it has no default, so give it a value")
        elif problem["type"] == "value_error":
            lines.append(f"{field}: {problem['ctx']['error']}" if field else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{field}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})")
    return OptionError(f"{subject}: " + "; ".join(lines))


def nearest(name: str, names: Iterable[str]) -> str:
    """What a mistyped name may have meant, as words for a message; empty where nothing is near."""
    close = list(dict.fromkeys(difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)))
    return f" (did you mean {' or '.join(repr(other) for other in close)}?)" if close else ""


def exit_code_of(error: BaseException) -> int:
    """What the command exits with because of an error, of the family or not."""
    if isinstance(error, OSError):  # a full disk under the standard output, say
        return InputError.exit_code
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
        return 128 + signal.SIGINT
    return int(getattr(error, "exit_code", 1))
