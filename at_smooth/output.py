"""Standard output and error of a command: they take any text, and never end the work that prints."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: Characters that control a terminal (line breaks and tabs apart) or the direction of writing, and their pictures.
_CONTROLS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys([*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
}

#: What we print beyond ASCII, where an encoding lacks it.
_PLAIN = {
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "\N{MULTIPLICATION SIGN}": "x",
    "━": "-",
    "─": "-",
}
_DEGRADING = "at-smooth.degrading"

#: What a write into a pipe that nobody reads, a closed connection or a terminal that is gone fails with.
_NOBODY_READS = (errno.EPIPE, errno.ECONNRESET, errno.EIO)


def _degrade(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error(_DEGRADING, _degrade)


def printable(text: str) -> str:
    """Text without what would control a terminal: a picture stands for each such character."""
    return text.translate(_CONTROLS)


def echo(text: str, err: bool = False) -> None:
    """Print text that is no one's table: CSV, Markdown, the message of an error."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:  # as where the terminal closed it beforehand
        print(printable(text), file=stream, flush=True)


class _Lasting(io.BufferedIOBase):
    """Writes into another buffer as long as that takes it, and drops the rest.

    Args:
        below: The buffer.

    Attributes:
        lost: Why nothing arrives any longer; None as long as something does.
    """

    def __init__(self, below: Any) -> None:
        self._below = below
        self.lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._below.write(data)
        except OSError as error:
            self._lose(error)
        return len(data)

    def flush(self) -> None:
        try:
            self._below.flush()
        except OSError as error:
            self._lose(error)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._below.fileno())

    def isatty(self) -> bool:
        return bool(self._below.isatty())

    def _lose(self, error: OSError) -> None:
        """Drop all that is written from here on, what is in buffers already and what libraries write too."""
        self.lost = self.lost or error
        with suppress(OSError):  # of a stream without a number
            number = self.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let standard output and error take whatever is printed while the block runs.

    Characters that their encoding lacks are replaced. If nobody reads any longer, or a disk is full, the rest is
    dropped and the work goes on.
    """
    before = sys.stdout, sys.stderr
    own = [_wrapped(stream) for stream in before]
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in own:
            if _below(stream):
                stream.detach()  # after a flush; the buffer below stays open


def output_failure() -> str:
    """Why standard output could not be written, other than that nobody reads it; empty where it could."""
    if sys.stdout is not None:
        sys.stdout.flush()
    lost = _lost()
    return "" if lost is None or lost.errno in _NOBODY_READS else lost.strerror or str(lost)


def nobody_reads() -> bool:
    """Whether whoever read standard output is gone."""
    return _lost() is not None


def _lost() -> OSError | None:
    below = _below(sys.stdout)
    return below.lost if below else None


def _below(stream: Any) -> _Lasting | None:
    buffer = getattr(stream, "buffer", None)
    return buffer if isinstance(buffer, _Lasting) else None


def _wrapped(stream: Any) -> Any:
    if not hasattr(stream, "buffer") or _below(stream):  # none, or one that holds text alone
        return stream
    stream.flush()
    errors = _DEGRADING if stream.errors in ("strict", "surrogateescape") else stream.errors
    return io.TextIOWrapper(
        _Lasting(stream.buffer), stream.encoding, errors, line_buffering=stream.line_buffering, write_through=True
    )
