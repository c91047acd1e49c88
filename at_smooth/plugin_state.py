"""What training plugins remember: saved, put back, and compared."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from at_smooth.digest import digest_of, is_dense
from at_smooth.exceptions import PluginError
from at_smooth.interfaces import TrainingPlugin
from at_smooth.notes import notify
from at_smooth.plugin_errors import blamed, described
from at_smooth.runtime import fenced_randomness

_PLAIN = (type(None), bool, int, float, str, bytes)
_CONTAINERS = (dict, OrderedDict, list, tuple)


def saved_state(plugin: TrainingPlugin) -> dict[str, Any]:
    """What a plugin remembers, as tensors and plain values, and nothing else.

    Raises:
        PluginError: There is something else in it, which a checkpoint cannot hold.
    """
    with blamed(plugin, "state"):
        state: object = plugin.state()
    wanted = "it should return a dict of tensors and plain values, {} where it remembers nothing"
    if type(state) not in (dict, OrderedDict):
        raise PluginError(f"{described(plugin)}: state() returned {type(state).__name__}; {wanted}.")
    for path, value in _leaves(state, "state()"):
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise PluginError(f"{described(plugin)}: {path} is a {type(value).__name__}; {_advice(value) or wanted}.")
        if isinstance(value, Tensor) and not is_dense(value):
            raise PluginError(f"{described(plugin)}: {path} is a sparse, quantized or meta tensor; give a dense one.")
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
            raise PluginError(f"{described(plugin)}: {path} is a tensor with a gradient's history; give its detach().")
    return state  # type: ignore[return-value]


def devices_of(state: object) -> list[bool]:
    """Of each tensor in a state, in its order there, whether it is elsewhere than on the CPU."""
    return [value.device.type != "cpu" for _, value in _leaves(state, "") if isinstance(value, Tensor)]


def copied(state: Any, elsewhere: list[bool] | None = None, device: torch.device | None = None) -> Any:
    """A state with containers and tensors of its own.

    Args:
        state: As :func:`saved_state` gives it.
        elsewhere: What :func:`devices_of` said of it.
        device: Where those tensors go for which that was true; the others, and all without it, go to the CPU.
    """
    count = len(devices_of(state))
    marks = [False] * count if elsewhere is None else elsewhere
    places = [device if each and device else torch.device("cpu") for each in marks]
    if len(places) != count:
        raise ValueError(f"it holds {count} tensors, not {len(places)}")
    return _copied(state, iter(places))


def restore(plugin: TrainingPlugin, state: dict[str, Any], elsewhere: list[bool], device: torch.device) -> None:
    """Hand a plugin what it remembered, as a copy, its tensors where they were."""
    plugin.restore(copied(state, elsewhere, device))


class FirstEpoch:
    """Finds out in the first epoch of a training whether a resumed one would know what this one remembers.

    Args:
        plugins: Set up, but for which nothing was trained yet.
        student: The model that is trained, whose weights are saved anyhow.

    Raises:
        PluginError: A plugin has a state and no ``restore``, or one that cannot be saved.
    """

    def __init__(self, plugins: Iterable[TrainingPlugin], student: nn.Module) -> None:
        self._plugins = list(plugins)
        self._student = student
        self._states: dict[int, tuple[dict[str, Any], list[bool]]] = {}
        self._attributes: dict[int, dict[str, Any]] = {}
        for number, plugin in enumerate(self._plugins):
            if _overrides(plugin, "state"):
                state = _restorable(plugin)
                self._states[number] = copied(state), devices_of(state)
            else:
                self._attributes[number] = self._fingerprints(plugin)

    def check(self, device: torch.device) -> None:
        """Compare, once it is over: states are read back on a copy of their plugin, attributes looked at again.

        Raises:
            PluginError: ``restore`` does not bring back what ``state`` gave.
        """
        for number, plugin in enumerate(self._plugins):
            if number in self._states:
                with fenced_randomness(0, "states"):
                    _read_back(plugin, *self._states[number], device)
                continue
            before, now = self._attributes[number], self._fingerprints(plugin)
            changed = [name for name in now if now[name] != before.get(name)]
            if changed:
                notify(
                    f"{described(plugin)}: {', '.join(changed)} changed in the first epoch, and there is no state() "
                    f"to save it. A resumed training begins without, and may end in other weights. Add state() and "
                    f"restore(); a state() that returns {{}} says that nothing needs to be saved."
                )

    def _fingerprints(self, plugin: TrainingPlugin) -> dict[str, Any]:
        private = {**vars(plugin), **(getattr(plugin, "__pydantic_private__", None) or {})}
        known = {tensor.data_ptr() for tensor in self._student.state_dict().values() if tensor.numel()}
        return {name: _fingerprint(value, known) for name, value in private.items() if name.startswith("_")}


def fingerprint(value: Any, known: Set[int] = frozenset()) -> Any:
    """Something that is equal for equal content: of tensors, modules, optimisers, generators and plain containers.

    Args:
        value: Of any kind; what is of none of these is compared by identity.
        known: Where tensors lie in memory that are not looked at.
    """
    if isinstance(value, Tensor):
        return "known" if value.numel() and value.data_ptr() in known else digest_of(value)
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return digest_of(value.get_state())
    if isinstance(value, np.random.Generator):
        return fingerprint(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        return fingerprint(value.state_dict(), known)
    if isinstance(value, Mapping):
        return {_hashable(key): fingerprint(each, known) for key, each in value.items()}
    if isinstance(value, list | tuple | deque):
        return [fingerprint(each, known) for each in value]
    if isinstance(value, set | frozenset):
        return {_hashable(each) for each in value}
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    return type(value).__name__, id(value)


def _fingerprint(value: Any, known: set[int]) -> Any:
    try:
        return fingerprint(value, known)
    except Exception:  # a state_dict that fails, a list that holds itself: nothing is known of it
        return None


def _read_back(plugin: TrainingPlugin, earlier: dict[str, Any], elsewhere: list[bool], device: torch.device) -> None:
    """Give a copy of a plugin its earlier state, then the present one, and see whether it takes them up."""
    now = _restorable(plugin)
    try:
        other = copy.deepcopy(plugin)
    except Exception:  # it holds what cannot be copied
        return
    for state, places in ((earlier, elsewhere), (now, devices_of(now))):
        with blamed(plugin, "restore"):
            restore(other, state, places, device)
        again, wanted = fingerprint(saved_state(other)), fingerprint(state)
        if again != wanted:
            names = [name for name in {**wanted, **again} if wanted.get(name) != again.get(name)]
            raise PluginError(
                f"{described(plugin)}: restore() does not take up what state() gave: afterwards state() has another "
                f"{', '.join(map(repr, names))}. A resumed training would end in other weights."
            )


def _restorable(plugin: TrainingPlugin) -> dict[str, Any]:
    state = saved_state(plugin)
    if state and not _overrides(plugin, "restore"):
        raise PluginError(
            f"{described(plugin)}: it has state() and no restore(state), so a resumed training would begin without "
            f"{', '.join(map(repr, state))}. Add restore, which takes up what state gave."
        )
    return state


def _overrides(plugin: TrainingPlugin, method: str) -> bool:
    return getattr(type(plugin), method) is not getattr(TrainingPlugin, method)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts, lists and tuples, with its place; the keys of dicts among them."""
    if type(value) not in _CONTAINERS:
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from ((f"a key of {path}", part) for _, part in _leaves(key, path))
            yield from _leaves(each, f"{path}[{key!r}]")
    else:
        for number, each in enumerate(value):
            yield from _leaves(each, f"{path}[{number}]")


def _copied(value: Any, places: Iterator[torch.device]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(next(places), copy=True)
    if isinstance(value, dict):
        own = copy.copy(value)  # with what torch writes beside the tensors of a state dict
        for key, each in value.items():
            own[key] = _copied(each, places)
        return own
    if type(value) in _CONTAINERS:
        return type(value)(_copied(each, places) for each in value)
    return value


def _advice(value: Any) -> str:
    """How a value can be saved that a checkpoint cannot hold as it is."""
    if isinstance(value, np.ndarray | np.generic):
        return "give torch.as_tensor(...) of it, or float(...)"
    if isinstance(value, dict):
        return "give dict(...) of it"
    if isinstance(value, set | frozenset | deque):
        return "give list(...) of it"
    if callable(getattr(value, "state_dict", None)):
        return "give its state_dict()"
    return ""


def _hashable(key: Any) -> Any:
    return key if isinstance(key, (*_PLAIN, tuple)) else id(key)
