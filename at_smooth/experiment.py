"""From a recipe to a finished run, and from a run back to its model and data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from at_smooth import checkpoint
from at_smooth.contracts import loaded
from at_smooth.data import Augmentation, Data
from at_smooth.engine import Engine
from at_smooth.exceptions import (
    AtSmoothError,
    CheckpointError,
    DataError,
    DivergedError,
    InputError,
    PluginError,
    RankLostError,
    RunDirectoryGoneError,
    StorageError,
)
from at_smooth.files import claimed_folder, remove_leftovers, usable_path
from at_smooth.interfaces import Dataset, Teachers
from at_smooth.lock import NAME as LOCK
from at_smooth.lock import FileLock, FolderLock
from at_smooth.network import build_network, network_from
from at_smooth.observer import Observer
from at_smooth.plugin_errors import blamed
from at_smooth.progress import Progress, Silent
from at_smooth.ranks import Ranks
from at_smooth.recipe import Recipe, plugins_in
from at_smooth.resume import refuse_another, restore, saved
from at_smooth.run import WRITTEN, Recorder, Run, refuse_taken
from at_smooth.runtime import Runtime, deterministic_algorithms, limited_threads
from at_smooth.stopping import Stopper
from at_smooth.teachers import Kinship, PlannedTeachers, SelfTeachers
from at_smooth.torchrun import losses_told, process_group
from at_smooth.trust import remember, trust_code

Weights = Literal["reported", "raw", "smoothed"]
Which = Literal["final", "best"]


def train(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    override: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a recipe, its self-teachers first where it needs them.

    From the first step on, SIGINT and SIGTERM end the training after the step in hand, saved. Where torchrun started
    this process, or a process group is there, all its ranks train together; the first reads, writes and reports.

    Args:
        recipe: What to train.
        out: The run directory, new or empty; None makes one under ``runs/``.
        resume: Continue the run in ``out`` exactly where it was saved last.
        override: Continue it on another device, by other versions and such.
        progress: Told how things go; None tells nobody.

    Returns:
        The finished run; on ranks but the first its files may be out of reach.

    Raises:
        InputError: The recipe cannot be carried out, or ``out`` is taken or in use.
        DivergedError: The loss or a weight is not finite; the last good checkpoint stands.
        StorageError: A file cannot be written; the last good checkpoint stands.
        RankLostError: Another rank died; the last good checkpoint stands.
        Interrupted: A signal came; the run is saved.
    """
    with (
        process_group() as ranks,
        limited_threads(recipe.threads),
        deterministic_algorithms(recipe.deterministic),
    ):
        told = progress if progress and ranks.first else Silent()
        with run_directory(recipe, out, ranks) as path:
            return _train(recipe, path, resume, override, told, role="student")


def _train(recipe: Recipe, path: Path, resume: bool, override: bool, progress: Progress, role: str) -> Run:
    ranks = Ranks.here()
    runtime = Runtime.choose(recipe.device, recipe.precision, recipe.compile, ranks, recipe.fast_layers)
    data = _prepare_data_by_turns(recipe, ranks)
    kinship = Kinship(recipe, data.fingerprint(), data.shape, data.num_classes)
    if ranks.by_first(lambda: kinship.fingerprint) != kinship.fingerprint:
        raise DataError("the data differ from those of rank 0. Give every machine the same files.")

    def is_finished() -> bool:
        if not resume:
            refuse_taken(path)
            planned_teachers(recipe, kinship)
            return False
        refuse_another(Run(path), saved(Run(path)), recipe, kinship.fingerprint, override)
        if Run(path).finished:
            FileLock(path / LOCK).remove_leftover()
        return Run(path).finished

    def begin() -> dict[str, Any]:
        """Make the run, or give the state that it goes on from."""
        remove_leftovers(path, WRITTEN)  # a process may have been killed before there was a run, too
        for lock in path.glob(f"teachers/*/{LOCK}"):
            FileLock(lock).remove_leftover()
        if resume:
            content = saved(Run(path))
            teachers.expect(content.get("teachers", {}))
            return content
        Run.create(path, recipe)
        return {}

    def train_teacher(teacher: Recipe, into: Path, name: str) -> None:
        def is_begun() -> bool:
            folder.check()  # or else the teacher would make the run directory anew
            return (into / "recipe.yaml").is_file()

        begun = ranks.by_first(is_begun)
        _train(teacher, into, begun, override, progress, role=f"{name} teacher")

    run = Run(path, elsewhere=True)
    if ranks.by_first(is_finished):
        return run

    teachers = SelfTeachers(kinship, path / "teachers", runtime, train_teacher, progress.note)
    engine = build_engine(recipe, data, runtime, teachers)
    folder = FolderLock(path)
    with ranks.held_by_first(folder):
        content = ranks.by_first(begin)
        if content:
            restore(engine, run, content)
        recorder = Recorder(run, recipe, kinship.fingerprint, ranks, teachers.digests, folder.check)
        try:
            with (
                progress.phase(role, recipe, path) as observer,
                Stopper(recorder.save) as stopper,
                losses_told(),
            ):
                engine.fit(recorder, stopper, observer, *[_Trust(recipe, progress)] * ranks.first)
                ranks.wait()
        except InputError as error:  # a teacher that does not fit, say: leave no run behind with nothing trained in it
            if isinstance(error, PluginError) and run.checkpoint("last").is_file():
                _add_what_stands(run, error)
            elif ranks.first and not resume and not any(path.rglob("*.pt")):
                run.discard()
            raise
        except RunDirectoryGoneError:
            folder.check()  # of a teacher's directory and the run's own the latter is what counts
            raise
        except (DivergedError, StorageError, RankLostError) as error:
            _add_what_stands(run, error)
            raise
    return run


class _Trust(Observer):
    """Remembers, once training begins, that the user trusts the code that the recipe names."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self._recipe = recipe
        self._progress = progress

    def started(self, engine: Engine) -> None:
        """Training begins."""
        problem = remember(plugins_in(self._recipe.to_dict()).values())
        if problem:
            self._progress.note(problem)


def build_engine(recipe: Recipe, data: Data, runtime: Runtime, teachers: Teachers | None = None) -> Engine:
    """A recipe's network and plugins in an engine, not yet trained."""
    engine = Engine(
        build_network(recipe, data.shape, data.num_classes, data.pixel_statistics()),
        data,
        method=recipe.plugin("method"),
        attack=recipe.attack_spec,
        regularizer=recipe.plugin("regularizer"),
        smoother=recipe.plugin("smoother"),
        settings=recipe,
        runtime=runtime,
        teachers=teachers,
    )
    engine.model_name = f"the network that model {recipe.model} builds"
    return engine


def _add_what_stands(run: Run, error: AtSmoothError) -> None:
    if not error.complete:  # a teacher's run has said it already
        error.add(_what_stands(run, error))
        error.complete = True


def _what_stands(run: Run, error: AtSmoothError) -> str:
    """What is left when a run breaks off, in words."""
    dump = f"What diverged is in {run.path / 'divergence.pt'}. " if isinstance(error, DivergedError) else ""
    last = run.checkpoint("last")
    try:
        epoch = saved(run)["state"]["epoch"]
    except (CheckpointError, KeyError, TypeError):
        return f"{dump}Nothing had been saved before."
    return f"{dump}The last good checkpoint stands: {last}, epoch {epoch}."


def planned_teachers(recipe: Recipe, kinship: Kinship | None = None) -> list[Recipe]:
    """The recipes of the self-teachers that a run trains first, found by asking its regularizer.

    Raises:
        InputError: One of them cannot be trained, or one that is brought along does not fit.
    """
    teachers, regularizer = PlannedTeachers(recipe, kinship), recipe.plugin("regularizer")
    with blamed(regularizer, "setup"):
        regularizer.setup(teachers)
    return teachers.recipes


def prepare_data(recipe: Recipe) -> Data:
    """Load, check and split the recipe's data.

    Raises:
        DataError: Something is missing, or is not what it must be.
    """
    dataset: Dataset = recipe.plugin("dataset")
    augmentation = Augmentation(dataset.crop, dataset.flip, dataset.rotation)
    return Data.split(
        loaded(dataset, recipe.data_dir),
        seed=recipe.seed,
        validation=recipe.validation,
        split=recipe.split,
        split_seed=recipe.split_seed,
        augmentation=augmentation,
    )


def _prepare_data_by_turns(recipe: Recipe, ranks: Ranks) -> Data:
    """Load the data on one rank of each machine before the others: what is not there may be downloaded."""
    if ranks.local:
        ranks.wait()
    data = prepare_data(recipe)
    if not ranks.local:
        ranks.wait()
    return data


@contextmanager
def run_directory(recipe: Recipe, out: Path | str | None, ranks: Ranks) -> Iterator[Path]:
    """The directory of a new run: the one given, or one under ``runs/`` whose name says the main choices.

    The latter is made here, for this training alone, and removed again if nothing is put into it. All ranks get the
    first one's.

    Raises:
        StorageError: It cannot be made.
    """
    neutral = {Recipe.model_fields[field].default for field in ("regularizer", "smoother")}
    choices = [recipe.dataset, recipe.method, recipe.regularizer, recipe.smoother]
    name = "-".join(choice.replace(":", ".") for choice in choices if choice not in neutral)
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    with ExitStack() as stack:

        def chosen() -> Path:
            if out is not None:
                return usable_path(out)
            return stack.enter_context(claimed_folder(map(Path("runs").joinpath, numbered)))

        yield ranks.by_first(chosen)


def load_model(
    source: Path | str, *, weights: Weights = "reported", checkpoint: Which = "final", trust: Iterable[str] = ()
) -> nn.Module:
    """A trained model in eval mode, on the CPU: images (N, C, H, W) in [0, 1] to logits (N, K).

    Args:
        source: A run directory, or one of its checkpoint files (then ``checkpoint`` does not matter).
        weights: ``"raw"``, ``"smoothed"``, or ``"reported"``: the smoothed ones where there are any.
        checkpoint: The last epoch, or the best by validation.
        trust: Code that the checkpoint may name, ``package.module:name`` each.

    Raises:
        UntrustedError: The checkpoint names code that the user has not trusted.
        InputError: An argument is none of these.
        CheckpointError: The file is unreadable, does not fit, or has no such weights.
    """
    for name, value, choices in (("weights", weights, get_args(Weights)), ("checkpoint", checkpoint, get_args(Which))):
        if value not in choices:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
    trust_code(trust)
    return stored_weights(Path(source), weights, checkpoint).network()


class Stored(NamedTuple):
    """Weights in a checkpoint file: the file, its content, and which of the weights are meant."""

    path: Path
    content: dict[str, Any]
    kind: str

    @property
    def recipe(self) -> Recipe:
        """What they were trained with."""
        with checkpoint.fitting(self.path):
            return Recipe(self.path, **self.content["recipe"])

    @property
    def run(self) -> Run | None:
        """The run whose checkpoint it is; None for a file that lies elsewhere."""
        folder = self.path.absolute().parent
        return (
            Run(folder.parent) if folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file() else None
        )

    def network(self) -> nn.Module:
        """The network with these weights, in eval mode, on the CPU."""
        return network_from(self.content, self.recipe, self.content[self.kind], self.path)


def stored_weights(source: Path, weights: Weights = "reported", which: Which = "final") -> Stored:
    """Find weights in a run directory or a checkpoint file; see :func:`load_model`."""
    run = Run(source) if source.is_dir() else None
    if run:
        averaged = run.checkpoint("best_smoothed").is_file() and weights != "raw"
        source = run.checkpoint("final" if which == "final" else "best_smoothed" if averaged else "best")
    content = checkpoint.load(source)
    if "state" in content:
        raise CheckpointError(f"{source} is a state to resume from. Load the run's best or final checkpoint instead.")
    if run:
        run.refuse_other(source, content)
    held = {kind: content[kind] for kind in ("raw", "smoothed") if content.get(kind)}
    wanted = weights if weights != "reported" else "smoothed" if "smoothed" in held else "raw"
    if wanted not in held:
        raise CheckpointError(f"{source} holds no {wanted} weights, but {' and '.join(held) or 'none'}.")
    return Stored(source, content, wanted)


def load_data(source: Path | str, *, trust: Iterable[str] = ()) -> Data:
    """The data of a run, split as it was; each part unpacks into ``(images, labels)``.

    Args:
        source: A run directory.
        trust: Code that its recipe may name, ``package.module:name`` each.

    Raises:
        UntrustedError: The recipe names code that the user has not trusted.
        DataError: The files are not where the run found them.
    """
    trust_code(trust)
    return prepare_data(Run(source).recipe)
