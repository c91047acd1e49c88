"""Weights for a model, from a file that any tool wrote: found, freed of the names of wrappers, and complete.

A state dict may lie under a key, or under several (raw and averaged weights, say). Its names may begin with those of
modules that wrapped the model, such as ``module.`` of ``DataParallel``. Nothing is guessed: weights are taken if every
parameter and buffer of the model is among them, with its shape, and nothing else is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from at_smooth import foreign_file
from at_smooth.exceptions import CheckpointError
from at_smooth.notes import notify

#: What wrappers of whole models are called in names: DataParallel, torch.compile, Lightning and many a script.
_WRAPPERS = {"module", "model", "net", "network"}
#: The same of wrappers whose names no model has of itself; they may be around any module within.
_RESERVED = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: Counters that averaging and profilers add to a state dict.
_COUNTERS = {"n_averaged", "total_ops", "total_params"}
#: A buffer of BatchNorm that old files lack; nothing depends on it in eval mode.
_OPTIONAL = "num_batches_tracked"

#: Keys of averaged weights.
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow|smoothed)(?![a-z])", re.IGNORECASE)

#: The option's word for the names at the top of a file.
_TOP = "."

_DEEPEST = 4  # keys below keys
_MOST = 1000  # dictionaries
_SHOWN = 3  # names in a message

#: A key, and tensors by name.
_Named = tuple[str, dict[str, Tensor]]


@dataclass(frozen=True)
class FoundWeights:
    """Weights in a file that fit a model.

    Attributes:
        key: Where in the file they are: keys and the names of wrappers, joined by dots; empty where it holds nothing
            else.
        state: By the model's own names.
        notes: What a user should know of the choice, a sentence each.
    """

    key: str
    state: dict[str, Tensor]
    notes: list[str]


@dataclass(frozen=True)
class _Fit:
    """How the tensors of one dictionary of a file fit a model.

    Attributes:
        key: Of the dictionary.
        wrappers: What all its names began with.
        state: What the model takes of it, by the model's names.
        missing: The model's names that it lacks.
        unexpected: Its own names that the model lacks.
        unlike: Names of tensors of another shape or kind, and in what they differ.
    """

    key: str
    wrappers: list[str]
    state: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    unlike: list[str]

    @property
    def whole(self) -> bool:
        return not (self.missing or self.unexpected or self.unlike)

    @property
    def nearness(self) -> tuple[int, int]:
        return len(self.state) - len(self.unlike), -len(self.unexpected)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "unlike the model's": self.unlike}
        return "; ".join(f"{kind}: {_few(names)}" for kind, names in kinds.items() if names)


def load_weights(model: nn.Module, file: Path | str, key: str | None = None) -> FoundWeights:
    """Load weights into a model, from what ``torch.save`` wrote of a state dict, or from safetensors.

    The weights take the model's own precision. The user is notified of which were taken, where there was a choice.

    Args:
        model: Any module.
        file: The file; nothing in it is run.
        key: Which weights, where the file holds several, or where wrappers hold more than the model: keys and names of
            wrappers, joined by dots, as in ``"state_dict"`` or ``"model.module.1"``.

    Returns:
        What was loaded, and what to tell the user of it.

    Raises:
        CheckpointError: The file is missing or unreadable, holds no weights that fit, or holds several.
    """
    found = find_weights(model, Path(file), key)
    for note in found.notes:
        notify(note)
    state = model.state_dict()  # with torch's notes on the versions of its layers
    state.update(found.state)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not fit the model: {error}") from None
    return found


def find_weights(model: nn.Module, file: Path, key: str | None = None) -> FoundWeights:
    """Find the weights of a model in a file; see :func:`load_weights`."""
    content = _safetensors(file) if file.suffix == ".safetensors" else foreign_file.read(file)
    held = _dictionaries(content)
    if not held:
        raise CheckpointError(f"{file} holds no state dict{_pickled_within(content)}.")
    own = model.state_dict()
    fits = [_fit(own, name, state) for name, state in (held if key is None else _chosen(held, key, file))]
    whole = _distinct([fit for fit in fits if fit.whole])
    if not whole:
        raise CheckpointError(_misfit(own, held, max(fits, key=lambda fit: fit.nearness), file))
    averaged = [fit for fit in whole if _AVERAGED.search(fit.key)]
    if len(whole) > 1 and len(averaged) != 1:
        raise CheckpointError(
            f"{file} holds several weights that fit the model, under {_keys(fit.key for fit in whole)}. "
            f"Choose one: --weights-key {_option(whole[0].key)}."
        )
    taken = averaged[0] if len(whole) > 1 else whole[0]
    return FoundWeights(_joined(taken.key, *taken.wrappers), taken.state, _notes(taken, whole, fits, file))


def _notes(taken: _Fit, whole: list[_Fit], fits: list[_Fit], file: Path) -> list[str]:
    """What to say of weights that were taken, and of averaged ones that were not."""
    notes = []
    others = [_option(fit.key) for fit in whole if fit is not taken]
    where = _joined(taken.key, *taken.wrappers)
    if others:
        notes.append(
            f"{file} holds raw and averaged weights; the averaged ones were taken, under {where!r}. "
            f"For others: --weights-key {' or '.join(others)}."
        )
    elif where:
        notes.append(f"{file}: the weights under {where!r} were taken.")
    notes += [
        f"{file} holds averaged weights under {fit.key!r}, too, which do not fit the model ({fit})."
        for fit in fits
        if not fit.whole and _AVERAGED.search(fit.key) and len(fit.state) + len(fit.unexpected) >= len(taken.state)
    ]
    return notes


def _dictionaries(content: Any) -> list[_Named]:
    """The dictionaries in a file that hold tensors by name, each under its key."""
    held = []
    queue = [("", content, 0)] if isinstance(content, Mapping) else []
    for key, dictionary, depth in queue:  # which grows meanwhile
        named = {name: value for name, value in dictionary.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            held.append((key, tensors))
        if depth < _DEEPEST:
            below = [
                (_joined(key, name), value, depth + 1) for name, value in named.items() if isinstance(value, Mapping)
            ]
            queue += below[: _MOST - len(queue)]
    return held


def _chosen(held: list[_Named], key: str, file: Path) -> list[_Named]:
    """What lies under a key: the dictionaries there, or the tensors of one whose names begin with the rest of it."""
    key = "" if key == _TOP else key
    below = [(name, state) for name, state in held if name == key or (key and name.startswith(f"{key}."))]
    if below:
        return below[:1] if not key else below
    for name, state in held:
        if not name or key.startswith(f"{name}."):
            under = _under(state, key.removeprefix(f"{name}.") if name else key)
            if under:
                return [(key, under)]
    raise CheckpointError(
        f"{file} holds no weights under {key or _TOP!r}, but under {_keys(name for name, _ in held)} (--weights-key)."
    )


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def _fit(own: Mapping[str, Any], key: str, state: Mapping[str, Tensor]) -> _Fit:
    """Compare the names, shapes and kinds of a model's tensors with those in a file, both without wrappers."""
    counters = _COUNTERS - {_last(name) for name in own}
    mine, _ = _unwrapped(own)
    theirs, wrappers = _unwrapped([name for name in state if _last(name) not in counters])
    taken = {mine[name]: state[theirs[name]] for name in mine if name in theirs}
    return _Fit(
        key=key,
        wrappers=[wrapper for wrapper in wrappers if wrapper != "module"],  # DataParallel's adds nothing
        state=taken,
        missing=[mine[name] for name in mine if name not in theirs and _last(name) != _OPTIONAL],
        unexpected=[theirs[name] for name in theirs if name not in mine],
        unlike=[words for name, value in taken.items() if (words := _difference(name, own[name], value))],
    )


def _unwrapped(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Names by what is left of them without wrappers, and the wrappers that all of them began with."""
    parts = {name: [part for part in name.split(".") if part not in _RESERVED] for name in names}
    wrappers: list[str] = []
    while len(firsts := {each[0] if len(each) > 1 else "" for each in parts.values()}) == 1 and firsts <= _WRAPPERS:
        wrappers += firsts
        parts = {name: each[1:] for name, each in parts.items()}
    short = {".".join(each): name for name, each in parts.items()}
    if len(short) < len(parts):  # names that only their wrappers tell apart
        return {name: name for name in names}, []
    return short, wrappers


def _difference(name: str, mine: Any, value: Tensor) -> str:
    """In what a tensor cannot take the place of another; empty where it can."""
    if not isinstance(mine, Tensor) or mine.shape != value.shape:
        return f"{name} {tuple(value.shape)}, not {tuple(getattr(mine, 'shape', ()))}"
    if value.is_meta:  # which torch "loads" by leaving the model's own
        return f"{name} on the device meta, without numbers"
    if (mine.is_floating_point(), mine.is_complex()) != (value.is_floating_point(), value.is_complex()):
        return f"{name} of {value.dtype}, not {mine.dtype}"
    return ""


def _distinct(fits: list[_Fit]) -> list[_Fit]:
    """Those that differ in their tensors: some files hold the same weights twice."""
    distinct: list[_Fit] = []
    for fit in fits:
        if not any(_same(fit.state, other.state) for other in distinct):
            distinct.append(fit)
    return distinct


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _misfit(own: Mapping[str, Any], held: list[_Named], nearest: _Fit, file: Path) -> str:
    """Why nothing in a file fits, by what comes nearest, and the option that would make it fit."""
    under = f", under {nearest.key!r}" if nearest.key else ""
    message = f"{file} does not fit the model{under}: {nearest}."
    first = next(iter(_unwrapped(own)[0]), "")
    keys = [
        _joined(key, name.removesuffix(f".{first}"))
        for key, state in held
        for name in state
        if name.endswith(f".{first}") and _fit(own, key, _under(state, name.removesuffix(f".{first}"))).whole
    ]
    if keys:
        return (
            f"{message} Those under {_keys(keys)} alone do fit; if the model needs none of the others (a "
            f"normalisation, say): --weights-key {keys[0]}."
        )
    if len(held) > 1:
        return f"{message} It holds weights under {_keys(key for key, _ in held)} (--weights-key)."
    return message


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _option(key: str) -> str:
    return key or _TOP


def _few(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _keys(keys: Iterable[str]) -> str:
    return _few([repr(_option(key)) for key in keys])


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _pickled_within(content: Any) -> str:
    pickled = [
        f"{name!r} is a pickled {value.name}"
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, foreign_file.LeftOut)
    ]
    return f"; {_few(pickled)}, which was not opened. Save the model's state_dict() instead" if pickled else ""


def _safetensors(file: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file

        return cast(dict[str, Any], load_file(file))
    except ModuleNotFoundError:
        raise CheckpointError(f"{file} needs safetensors: python -m pip install safetensors.") from None
    except Exception as error:  # as for any other file
        raise CheckpointError(f"{file} is no safetensors file, or a damaged one ({error}).") from None
