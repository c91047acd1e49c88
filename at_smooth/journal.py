"""What an evaluation has done so far, on disk, so that a killed one carries on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from at_smooth import checkpoint
from at_smooth.digest import digest_of
from at_smooth.exceptions import CheckpointError, StorageError
from at_smooth.interfaces import Outcome


class Journal:
    """Remembers the states of evaluations, each under a key made of everything that shapes its result.

    Args:
        folder: Where; None remembers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._written: set[Path] = set()

    def read(self, key: str) -> dict[str, Any] | None:
        """The state that was written last under a key; None where there is none, or none that can be read."""
        if self._folder is None:
            return None
        for leftover in self._folder.glob(f".{self._file(key).name}.*.part"):  # of a process that was killed
            with suppress(OSError):  # or of one that evaluates the same now, and then goes on without this state
                leftover.unlink()
        try:
            state: dict[str, Any] = checkpoint.load(self._file(key))["evaluation"]
        except (CheckpointError, KeyError):
            return None
        self._written.add(self._file(key))
        return state

    def write(self, key: str, state: dict[str, Any]) -> None:
        """Keep a state of tensors and plain values; where that cannot be, the evaluation goes on without."""
        if self._folder is None:
            return
        with suppress(OSError, StorageError):
            self._folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(self._file(key), {"evaluation": state})
            self._written.add(self._file(key))

    def close(self) -> None:
        """Forget what was read or written here: its results are in the user's hands."""
        for file in self._written:
            file.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return Path(self._folder or "") / f"{key}.pt"


class Memory:
    """One evaluator's page of a journal.

    Args:
        journal: Which.
        key: Under which name.
    """

    def __init__(self, journal: Journal, key: str) -> None:
        self._journal = journal
        self._key = key

    def recall(self, outcome: Outcome) -> tuple[int, int]:
        """Bring an outcome to where it was; gives the stage it was in and how many of its batches are done."""
        state = self._journal.read(self._key)
        if state is None or not _fits(state, outcome):
            return 0, 0
        outcome.broken_by, outcome.distances = state["broken_by"], state["distances"]
        outcome.seconds, outcome.notes = state["seconds"], state["notes"]
        return state["stage"], state["batches"]

    def keep(self, outcome: Outcome, stage: int, batches: int) -> None:
        """Write down an outcome in the middle of a stage."""
        self._journal.write(self._key, {
            "broken_by": outcome.broken_by, "distances": outcome.distances, "seconds": outcome.seconds,
            "notes": outcome.notes, "stage": stage, "batches": batches,
        })  # fmt: skip


def _fits(state: dict[str, Any], outcome: Outcome) -> bool:
    """Whether a state is one of as many examples, whatever else has its key."""
    try:
        same = all(
            (state[name].shape, state[name].dtype) == (own.shape, own.dtype)
            for name, own in (("broken_by", outcome.broken_by), ("distances", outcome.distances))
        )
        kinds = {"seconds": float, "notes": list, "stage": int, "batches": int}
        return same and all(isinstance(state[name], kind) for name, kind in kinds.items())
    except (KeyError, AttributeError):
        return False


def source_of(plugin: object) -> str:
    """A digest of the file that defines a plugin's class: code that changed does not carry on what other code began."""
    try:
        return hashlib.sha256(Path(inspect.getfile(type(plugin))).read_bytes()).hexdigest()
    except (TypeError, OSError):  # not from a file
        return ""


def digest(facts: Mapping[str, Any]) -> str:
    """A key made of facts in plain types."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def digest_of_model(model: nn.Module) -> str:
    """A digest of a model's structure and of every tensor in it."""
    return digest_of_tensors(repr(model), *model.state_dict().values())


def digest_of_tensors(words: str, *tensors: Tensor) -> str:
    """A digest of some words and tensors."""
    return digest_of([words, *tensors])
