"""Files that are whole or not there: written aside, synced, replaced; read without running anything in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from at_smooth.exceptions import AtSmoothError, CheckpointError, StorageError
from at_smooth.interruption import uninterrupted

#: Raised whenever the layout of checkpoints changes.
FORMAT = 1

#: Names of files that are being written, as a pattern.
LEFTOVERS = ".*.[0-9]*.part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the place of another: a reader, or a crash at any moment, finds the old one or the new.

    Raises:
        StorageError: It cannot be written; the old one stands.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with uninterrupted(), storing(path):
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write into one message that names the file.

    Raises:
        StorageError: The block failed to write.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save answers a failed write with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"cannot write {path} ({cause.strerror or cause}).") from None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in a folder that nobody else writes to."""
    for aside in folder.glob(f"**/{LEFTOVERS}"):
        with suppress(OSError):
            aside.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a replaced file last through a power cut, where the system syncs folders."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. ``content`` holds tensors and plain values only."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of at-smooth's onto the CPU.

    Raises:
        CheckpointError: It is missing, truncated, no checkpoint of at-smooth's, or holds code (which is not run).
    """
    content = read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of at-smooth (format {FORMAT}).")
    return content


def read(path: Path, what: str = "checkpoint") -> Any:
    """Read tensors and plain values that ``torch.save`` wrote, onto the CPU.

    Args:
        path: The file.
        what: It should be, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, or holds code (which is not run).
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {what} at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sums(path)
    except pickle.UnpicklingError:  # torch's own message advises to load it unsafely
        raise CheckpointError(
            f"{path} is no {what}, or holds more than tensors and plain values; it was not opened, "
            f"since such a file could run code. Of a model, save the state_dict()."
        ) from None
    except Exception as error:  # a damaged file breaks the reader in any way it likes
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(f"{path} is no readable {what} ({reason}).") from None
    return content


def _check_sums(path: Path) -> None:
    """Compare the archive's check sums, which torch writes and does not look at."""
    if not zipfile.is_zipfile(path):  # the format of torch before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the check sum of {damaged} is wrong")


def refuse_other_kinds(own: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Refuse numbers of another kind, which ``load_state_dict`` would silently round: integers for floats, say.

    Args:
        own: What a module or a smoother holds.
        kept: What a file holds for it.

    Raises:
        ValueError: A tensor of the file's is of another kind; :func:`fitting` says which file's.
    """
    for name, value in kept.items():
        mine = own.get(name)
        if not (isinstance(value, torch.Tensor) and isinstance(mine, torch.Tensor)):
            continue
        if value.is_floating_point() != mine.is_floating_point() or value.is_complex() != mine.is_complex():
            raise ValueError(f"{name} is {value.dtype}, not {mine.dtype}")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Take up what a checkpoint holds; whatever is missing in it, or of another kind, is the file's fault.

    Raises:
        CheckpointError: The block failed.
    """
    try:
        yield
    except AtSmoothError:
        raise
    except Exception as error:  # as many kinds as there are ways not to fit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = type(error).__name__
        raise CheckpointError(
            f"{path} does not hold what it should ({kind}: {reason}). It is damaged, or was not written by at-smooth."
        ) from None
