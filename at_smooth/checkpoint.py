"""Checkpoints: tensors and plain values in a file, with a check sum of the content; read without running anything."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from at_smooth.archive import check_entries, compare_check_sums, is_archive
from at_smooth.digest import digest_of
from at_smooth.exceptions import AtSmoothError, CheckpointError
from at_smooth.files import creating, replacing

#: Raised whenever the layout of checkpoints changes. 2: a digest of the content.
FORMAT = 2


def save(path: Path, content: dict[str, Any], new: bool = False) -> None:
    """Write a checkpoint whole or not at all, with a digest of its content (:func:`at_smooth.digest.digest_of`).

    Args:
        path: The file.
        content: Tensors and plain values.
        new: Refuse a file that is there.

    Raises:
        CheckpointError: It holds something else, which could not be read again.
        TakenError: The file was to be new and is there.
        StorageError: The file cannot be written.
    """
    content = {"format": FORMAT, **content}
    try:
        digest = digest_of(content)
    except TypeError as error:
        raise CheckpointError(f"{path} is not written: {error}. A checkpoint holds nothing else.") from None
    with creating(path) if new else replacing(path) as file:
        torch.save({"digest": digest, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of at-smooth's onto the CPU: the content that :func:`save` was given.

    Raises:
        CheckpointError: It is missing, damaged, no checkpoint of at-smooth's, or holds code (which is not run).
    """
    content = read(path)
    written_as = content.get("format") if isinstance(content, dict) else None
    if isinstance(content, dict) and written_as == FORMAT and "digest" in content:
        return {name: value for name, value in content.items() if name not in ("format", "digest")}
    if isinstance(written_as, int) and 0 < written_as < FORMAT:
        raise CheckpointError(
            f"{path} was written by an older version of at-smooth, as a checkpoint of format {written_as} with no "
            f"check sum of its content; this version reads format {FORMAT} alone. Train it again, or use that version."
        )
    raise CheckpointError(f"{path} was not written by this version of at-smooth (format {FORMAT}).")


def read(path: Path, what: str = "checkpoint") -> Any:
    """Read tensors and plain values that ``torch.save`` wrote, onto the CPU.

    Of a checkpoint of at-smooth's the digest of its content is compared; of other files the check sums of the archive,
    of which there are none in files from before torch 1.6.

    Args:
        path: The file.
        what: It should be, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, or holds code (which is not run).
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {what} at {path}.")
    try:
        archived = is_archive(path)
        if archived:
            check_entries(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and content.get("format") == FORMAT and "digest" in content:
            _compare_digest(content)
        elif archived:
            compare_check_sums(path)
    except pickle.UnpicklingError:  # torch's own message advises to load it unsafely
        raise CheckpointError(
            f"{path} is no {what}, or holds more than tensors and plain values; it was not opened, "
            f"since such a file could run code. Of a model, save the state_dict()."
        ) from None
    except Exception as error:  # a damaged file breaks the reader in any way it likes
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(f"{path} is no readable {what} ({reason}).") from None
    return content


def _compare_digest(content: Mapping[str, Any]) -> None:
    if digest_of({name: value for name, value in content.items() if name != "digest"}) != content["digest"]:
        raise ValueError("the check sum of its content is wrong")


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
