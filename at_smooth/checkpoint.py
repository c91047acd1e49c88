"""Files that are whole or not there: written aside, synced, replaced; read without running anything in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from at_smooth.exceptions import CheckpointError

#: Raised whenever the layout of checkpoints changes.
FORMAT = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically. ``content`` holds tensors and plain values only."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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
