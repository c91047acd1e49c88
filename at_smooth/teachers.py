"""Self-teachers: copies of the student's architecture, found, trained or reused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from at_smooth import checkpoint, files, registry
from at_smooth._version import __version__
from at_smooth.attacks import AttackSpec
from at_smooth.exceptions import CheckpointError, StorageError
from at_smooth.network import network_from
from at_smooth.recipe import CIRCUMSTANCES, Recipe, plugins_in
from at_smooth.runtime import Runtime
from at_smooth.trust import check
from at_smooth.versions import plugin_versions

if TYPE_CHECKING:
    from at_smooth.engine import Engine

#: What the cache keeps of a teacher's run.
_KEPT = ("recipe.yaml", "environment.json", "metrics.csv", "summary.json", "curves.png", "checkpoints/best.pt")


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

    def refuse_stranger(self, content: dict[str, Any], source: Path) -> None:
        """Refuse a checkpoint that cannot teach this student.

        Raises:
            CheckpointError: It is of another architecture, another data set or another split.
        """
        with checkpoint.fitting(source):
            reasons = self._reasons(content)
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
        folder: The ``teachers/`` of the student's run, which gets a copy (a hard link where there are such).
        runtime: Where the teachers run.
        train: Trains a recipe into a directory, or continues there.
        note: Told in words where each teacher comes from.
    """

    def __init__(
        self,
        kinship: Kinship,
        folder: Path,
        runtime: Runtime,
        train: Callable[[Recipe, Path, str], None],
        note: Callable[[str], None],
    ) -> None:
        self._kinship = kinship
        self._folder = folder
        self._runtime = runtime
        self._train = train
        self._note = note

    def get(self, method: str, path: Path | None = None, **changes: Any) -> nn.Module:
        """A teacher, frozen, in eval mode.

        Raises:
            CheckpointError: The checkpoint at ``path`` is unreadable, or from another architecture, data set or split.
        """
        name = _kind(method, changes)
        own = self._folder / name / "checkpoints" / "best.pt"
        if path is None:
            self._find_or_train(name, teacher_recipe(self._kinship.recipe, method, **changes))
        content = self._runtime.ranks.by_first(lambda: self._content(name, path, own))
        network = network_from(content, self._kinship.recipe, _weights(content, own), own)
        return self._runtime.teacher(network)

    def _content(self, name: str, path: Path | None, own: Path) -> dict[str, Any]:
        """What the checkpoint holds, of which the run has a copy."""
        if path is not None and not own.is_file():
            source = _checkpoint_at(path)
            self._kinship.refuse_stranger(checkpoint.load(source), source)
            _link(source, own)
            self._note(f"teacher '{name}': {source}")
        content = checkpoint.load(own)
        self._kinship.refuse_stranger(content, own)
        return content

    def _find_or_train(self, name: str, recipe: Recipe) -> None:
        own = self._folder / name
        cached = cache_directory() / "teachers" / teacher_key(recipe, self._kinship.fingerprint)
        if not self._runtime.ranks.by_first(lambda: self._found(name, own, cached)):
            self._train(recipe, own, name)
        self._runtime.ranks.by_first(lambda: self._keep(own, cached))

    def _found(self, name: str, own: Path, cached: Path) -> bool:
        """Whether the run has the teacher, taken from the cache perhaps."""
        begun, done = (own / "recipe.yaml").is_file(), (own / "summary.json").is_file()
        if not begun and self._usable(cached):
            _copy_run(cached, own)
            self._note(f"self-teacher '{name}': reused from the cache ({cached})")
            return True
        if not done:
            self._note(f"self-teacher '{name}': {'continued' if begun else 'trained first, then cached'}")
        return done

    def _keep(self, own: Path, cached: Path) -> None:
        """Put a teacher that was trained here into the cache."""
        last = own / "checkpoints" / "last.pt"
        if last.is_file():
            _publish(own, cached)
            last.unlink()  # nothing to resume; the optimiser's state is large

    def _usable(self, cached: Path) -> bool:
        if not (cached / "summary.json").is_file():
            return False
        best = cached / "checkpoints" / "best.pt"
        try:
            self._kinship.refuse_stranger(checkpoint.load(best), best)
        except CheckpointError as error:
            self._note(f"self-teacher in the cache is damaged and is trained again: {error}")
            shutil.rmtree(cached, ignore_errors=True)
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


def cache_directory() -> Path:
    """Where teachers are kept between runs: ``AT_SMOOTH_CACHE``, or the user's cache directory."""
    own = os.environ.get("AT_SMOOTH_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(shared) if shared else Path.home() / ".cache") / "at-smooth"


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


def _publish(own: Path, cached: Path) -> None:
    """Put a finished teacher into the cache whole, or leave the one that another run put there meanwhile."""
    aside = cached.with_name(f".{cached.name}.{os.getpid()}.part")
    try:
        _copy_run(own, aside)
        os.rename(aside, cached)
    except (OSError, StorageError):
        pass  # someone was quicker, or the cache cannot be written; this run has its own copy
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy_run(source: Path, target: Path) -> None:
    for name in _KEPT:  # the summary says that a run is finished, so the weights must be there before it
        if name != "summary.json" and (source / name).is_file():
            _link(source / name, target / name)
    _link(source / "summary.json", target / "summary.json")


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; files of runs are replaced, never changed in place."""
    if target.exists() and target.samefile(source):
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    with files.storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:
            with source.open("rb") as file, files.replacing(target) as own:
                shutil.copyfileobj(file, own)
        else:
            os.replace(aside, target)
