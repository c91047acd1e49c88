"""Self-teachers: copies of the student's architecture, found, trained or reused."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from at_smooth import checkpoint, registry
from at_smooth._version import __version__
from at_smooth.attacks import AttackSpec
from at_smooth.digest import digest_of
from at_smooth.exceptions import CheckpointError
from at_smooth.network import network_from
from at_smooth.recipe import CIRCUMSTANCES, HARMLESS, Recipe, differences, plugins_in
from at_smooth.runtime import Runtime
from at_smooth.teacher_cache import CachedTeacher, copy_file, remove_leftovers
from at_smooth.torchrun import stop_without_launcher
from at_smooth.trust import check
from at_smooth.versions import plugin_versions

if TYPE_CHECKING:
    from at_smooth.engine import Engine

#: What becomes of a self-teacher: the run has it, has to train it, or waits for another process that does.
Found = Literal["found", "train", "wait"]

_LOOK_EVERY = 0.2  # seconds between two looks at a teacher that another process trains
_ROUND = 5.0  # seconds of such looks, after which all ranks meet


class TrainedOnTheSpot:
    """Teachers of a bare engine: its model's initial copy, trained on its data by another method, kept nowhere.

    Args:
        engine: The student's, before it trains.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._initial = {name: value.detach().cpu().clone() for name, value in engine.model.state_dict().items()}

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A teacher; with ``path``, a checkpoint whose weights fit the engine's model.

        Of ``changes``, an engine without a recipe knows ``attack`` and ``attack_options``.

        Raises:
            CheckpointError: The checkpoint does not fit.
        """
        from at_smooth.engine import Engine

        student = self._engine
        model = copy.deepcopy(student.model)
        if path is not None:
            source = path
            weights = student.runtime.ranks.by_first(lambda: _weights(checkpoint.load(_checkpoint_at(source)), source))
        else:
            model.load_state_dict(self._initial)
            teacher = Engine(
                model,
                student.data,
                method=registry.build("methods", method),
                attack=_changed(student.wanted_attack, changes),
                settings=student.settings.model_copy(update={"test_every": 0}),
                runtime=student.runtime,
            )
            teacher.fit()
            weights = teacher.best["raw"].weights
        with checkpoint.fitting(path or Path("the teacher")):
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(f"the teacher {path} does not fit the student: {error}") from None
        return student.runtime.teacher(model)


@dataclass(frozen=True)
class Kinship:
    """What a student and its teachers must share.

    Attributes:
        recipe: The student's.
        fingerprint: Its data and split.
        shape: Its images, (C, H, W).
        num_classes: K.
    """

    recipe: Recipe
    fingerprint: str
    shape: tuple[int, int, int]
    num_classes: int

    def refuse_stranger(self, content: dict[str, Any], source: Path, recipe: Recipe | None = None) -> None:
        """Refuse a checkpoint that cannot teach this student.

        Args:
            content: What the file holds.
            source: The file.
            recipe: What it has to be trained with; None for any recipe of a teacher that the user brings.

        Raises:
            CheckpointError: It is of another architecture, another data set or another split, or was trained otherwise.
        """
        with checkpoint.fitting(source):
            reasons = self._reasons(content)
            if recipe is not None:
                ignored = {*CIRCUMSTANCES, *HARMLESS}
                changed = differences(content["recipe"], recipe.to_dict(), ignored).values()
                reasons += [f"it was trained with another recipe ({'; '.join(changed)})"] if changed else []
        if reasons:
            raise CheckpointError(f"the teacher {source} does not fit the student: {'; '.join(reasons)}.")
        _weights(content, source)

    def _reasons(self, content: dict[str, Any]) -> list[str]:
        recipe, ours = content.get("recipe", {}), self.recipe.to_dict()
        reasons = [
            f"its {field.replace('_', ' ')} is {recipe.get(field)}, the student's is {ours[field]}"
            for field in ("model", "model_options")
            if recipe.get(field) != ours[field]
        ]
        for what, theirs, own in (
            ("image shape", content.get("shape"), list(self.shape)),
            ("number of classes", content.get("num_classes"), self.num_classes),
        ):
            if theirs != own:
                reasons.append(f"its {what} is {theirs}, the student's is {own}")
        if content.get("fingerprint") != self.fingerprint:
            reasons.append(
                f"it was trained on other data or another split (data set {recipe.get('dataset')}, "
                f"seed {recipe.get('seed')}; the student's: {ours['dataset']}, seed {ours['seed']})"
            )
        return reasons


class PlannedTeachers:
    """Teachers that nobody trains: notes whom a regularizer asks for, and refuses at once what cannot be had.

    Args:
        recipe: The student's.
        kinship: What teachers that are brought along must fit; None does not look at them.
    """

    def __init__(self, recipe: Recipe, kinship: Kinship | None = None) -> None:
        self.recipes: list[Recipe] = []
        self._recipe = recipe
        self._kinship = kinship

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A module that does nothing.

        Raises:
            InputError: The teacher's recipe is none, or the checkpoint at ``path`` does not fit.
        """
        if path is None:
            self.recipes.append(teacher_recipe(self._recipe, method, **changes))
        elif self._kinship:
            source = _checkpoint_at(path)
            self._kinship.refuse_stranger(checkpoint.load(source), source)
        return nn.Identity()


class SelfTeachers:
    """Teachers of a run: kept in the run's ``teachers/``, found in the user's cache, or trained and cached.

    Each is a run of its own with the student's recipe, another method and no smoothing; its best epoch by validation
    (SA for the standard one, RA for a robust one) teaches. All ranks train it; the first looks after
    the files.

    Args:
        kinship: The student's, which teachers must fit.
        folder: The ``teachers/`` of the student's run, which gets a copy.
        runtime: Where the teachers run.
        train: Trains a recipe into a directory, or continues there.
        note: Told in words where each teacher comes from.

    Attributes:
        digests: A digest of the weights of each teacher that was asked for, by its name.
    """

    def __init__(
        self,
        kinship: Kinship,
        folder: Path,
        runtime: Runtime,
        train: Callable[[Recipe, Path, str], None],
        note: Callable[[str], None],
    ) -> None:
        self.digests: dict[str, str] = {}
        self._kinship = kinship
        self._folder = folder
        self._runtime = runtime
        self._train = train
        self._note = note
        self._expected: dict[str, Any] = {}
        self._asked: dict[str, Path | None] = {}

    def expect(self, digests: Any) -> None:
        """Refuse teachers that are not those of a run which is continued: their digests then."""
        self._expected = digests if isinstance(digests, dict) else {}

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A teacher, frozen, in eval mode.

        Raises:
            CheckpointError: The checkpoint at ``path`` is unreadable, or from another architecture, data set or split;
                or the run's teacher is not the one that it was begun with.
        """
        name = self._name(_kind(method, changes), path)
        own = self._folder / name / "checkpoints" / "best.pt"
        recipe = None if path is not None else teacher_recipe(self._kinship.recipe, method, **changes)
        if recipe is not None:
            self._find_or_train(name, recipe)
        content = self._runtime.ranks.by_first(lambda: self._content(name, path, recipe, own))
        network = network_from(content, self._kinship.recipe, _weights(content, own), own)
        return self._runtime.teacher(network)

    def _name(self, kind: str, path: Path | None) -> str:
        """The folder of a teacher: its kind, numbered from the second file of one kind on, in the order asked for."""
        numbered = itertools.chain([kind], (f"{kind}-{number}" for number in itertools.count(2)))
        return next(name for name in numbered if self._asked.setdefault(name, path) == path)

    def _content(self, name: str, path: Path | None, recipe: Recipe | None, own: Path) -> dict[str, Any]:
        """What the checkpoint holds, of which the run has a copy."""
        if path is not None and not own.is_file():
            source = _checkpoint_at(path)
            self._kinship.refuse_stranger(checkpoint.load(source), source)
            copy_file(source, own)
            self._note(f"teacher '{name}': {source}")
        content = checkpoint.load(own)
        self._kinship.refuse_stranger(content, own, recipe)
        digest = digest_of(dict(_weights(content, own)))
        if self._expected.get(name, digest) != digest:
            raise CheckpointError(
                f"{own} does not hold the weights that this run has learned from so far. Put the file back that was "
                f"there, or start a new run with --out."
            )
        self.digests[name] = digest
        return content

    def _find_or_train(self, name: str, recipe: Recipe) -> None:
        """Have the teacher in the run: from an earlier start, from the cache, or trained; together."""
        own, ranks = self._folder / name, self._runtime.ranks
        cached = CachedTeacher(teacher_key(recipe, self._kinship.fingerprint))
        waiting = False
        try:
            while (found := ranks.by_first(partial(self._look, name, own, recipe, cached, waiting))) == "wait":
                waiting = True  # in rounds, since other ranks wait for the first no longer than their patience
                stop_without_launcher(ranks, f"stopped, waiting for the self-teacher '{name}'")
            if found == "train":
                self._train(recipe, own, name)
            ranks.by_first(lambda: self._keep(own, cached))
        finally:
            cached.release()

    def _look(self, name: str, own: Path, recipe: Recipe, cached: CachedTeacher, waiting: bool) -> Found:
        """Whether the run has the teacher now, or has to train it, or to wait a little longer for who is at it."""
        if (own / "summary.json").is_file():
            return "found"
        if (own / "checkpoints" / "last.pt").is_file():
            cached.claim()  # whoever has it trains its own; this one goes on with what it began
            self._note(f"self-teacher '{name}': continued")
            return "train"
        if not waiting:
            remove_leftovers()
        patience = time.monotonic() + _ROUND
        while True:
            claimed = cached.claim()
            if cached.finished and self._usable(cached, recipe, claimed):
                cached.copy_to(own)
                self._note(f"self-teacher '{name}': reused from the cache ({cached.path})")
                return "found"
            if claimed:
                cached.remove()  # what could not be used
                self._note(f"self-teacher '{name}': trained first, then cached")
                return "train"
            if not waiting:
                waiting = True
                self._note(
                    f"self-teacher '{name}': {cached.owner()} trains the same one for another run; waiting for it"
                )
            if time.monotonic() > patience:
                return "wait"
            time.sleep(_LOOK_EVERY)

    def _keep(self, own: Path, cached: CachedTeacher) -> None:
        """Put a teacher that was trained here into the cache."""
        last = own / "checkpoints" / "last.pt"
        if last.is_file():
            cached.publish(own)
            last.unlink()  # nothing to resume; the optimiser's state is large

    def _usable(self, cached: CachedTeacher, recipe: Recipe, claimed: bool) -> bool:
        best = cached.path / "checkpoints" / "best.pt"
        try:
            self._kinship.refuse_stranger(checkpoint.load(best), best, recipe)
        except CheckpointError as error:
            if claimed:
                self._note(f"self-teacher in the cache is damaged and is trained again: {error}")
            return False
        return True


def teacher_recipe(recipe: Recipe, method: str, **changes: Any) -> Recipe:
    """The student's recipe with another method, no smoothing and no look at the test set."""
    neutral = {field: Recipe.model_fields[field].default for field in ("regularizer", "smoother")}
    check(plugins_in({**changes, "method": method}), f"the regularizer {recipe.regularizer}")
    return recipe.replacing(**neutral, method=method, test_every=0, keep_checkpoints=0, **changes)


def teacher_key(recipe: Recipe, fingerprint: str) -> str:
    """A name made of everything that shapes a teacher: its recipe, the data and split, the plugins' versions."""
    shaping = {field: value for field, value in recipe.to_dict().items() if field not in CIRCUMSTANCES}
    everything = json.dumps([shaping, fingerprint, plugin_versions(recipe), __version__], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
    return f"{recipe.dataset}-{recipe.model}-{recipe.method}-{digest}".replace(":", "_").replace("/", "_")


def _kind(method: str, changes: dict[str, Any]) -> str:
    """A folder's name for one kind of teacher, as in ``at`` or ``at-steps-100``."""
    parts = [method]
    for value in changes.values():
        parts += [f"{key}-{each}" for key, each in value.items()] if isinstance(value, dict) else [str(value)]
    return "-".join(parts).replace(":", ".").replace("/", ".")


def _changed(attack: AttackSpec, changes: dict[str, Any]) -> AttackSpec:
    if not changes:
        return attack
    same = changes.get("attack", attack.name) == attack.name
    options = {**(attack.options() if same else {}), **changes.get("attack_options", {})}
    return AttackSpec.parse(changes.get("attack", attack.name), attack.threat, options)


def _weights(content: dict[str, Any], source: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] | None = content.get("smoothed") or content.get("raw")
    if not weights:
        raise CheckpointError(f"{source} holds no weights to teach with. Give a run, or its checkpoints/best.pt.")
    return weights


def _checkpoint_at(path: Path) -> Path:
    path = path.expanduser()
    return path / "checkpoints" / "best.pt" if path.is_dir() else path
