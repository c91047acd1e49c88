"""Files that are whole or not there: written aside, synced, replaced; read without running anything in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from at_smooth.exceptions import CheckpointError
from at_smooth.interruption import uninterrupted

#: Raised whenever the layout of checkpoints changes.
FORMAT = 1


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the place of another: a reader, or a crash at any moment, finds the old one or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with uninterrupted():
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. ``content`` holds tensors and plain values only."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: It is missing, truncated, no checkpoint of at-smooth's, or holds code (which is not run).
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises to load it unsafely
        raise CheckpointError(
            f"{path} is no checkpoint, or holds more than tensors and plain values; it was not opened, "
            f"since such a file could run code."
        ) from None
    except Exception as error:  # a damaged file breaks the reader in any way it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no readable checkpoint ({reason}).") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of at-smooth (format {FORMAT}).")
    return content
