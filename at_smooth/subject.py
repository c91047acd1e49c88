"""What is evaluated: a model, images, and a threat; from a run, a checkpoint, or anyone's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn

from at_smooth import checkpoint, registry
from at_smooth.data import Data, Part, check, stratified_subset
from at_smooth.exceptions import CheckpointError, InputError, OptionError
from at_smooth.experiment import Weights, Which, prepare_data, stored_weights
from at_smooth.interfaces import Dataset
from at_smooth.recipe import Recipe
from at_smooth.runtime import fenced_randomness
from at_smooth.threat import Norm, Threat

PartName = Literal["test", "val", "train"]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K), in eval mode, on the CPU.
        part: Images and labels.
        threat: What the adversary may do.
        facts: What a report says of it, in plain types.
        run: The run directory that it comes from, if it does.
        data: All parts of its data set.
        threads: CPU threads on which it is fastest; None for torch's own number.
    """

    model: nn.Module
    part: Part
    threat: Threat
    facts: dict[str, Any]
    data: Data
    run: Path | None = None
    threads: int | None = None

    def subset(self, n: int | None, seed: int) -> Subject:
        """The same with n of its examples, drawn by seed, the classes in their proportions; None keeps all.

        Raises:
            OptionError: There are not so many.
        """
        if n is None:
            return self
        if not 1 <= n <= self.part.n:
            raise OptionError(f"--n-examples is {n}; there are {self.part.n} examples.")
        chosen = stratified_subset(self.part.labels, n, seed)
        return replace(self, part=Part(self.part.images[chosen], self.part.labels[chosen]))


@dataclass(frozen=True)
class Wanted:
    """What of a subject a user names; what is None follows from the run.

    Attributes:
        weights: Which weights of a checkpoint.
        checkpoint: Which checkpoint of a run.
        part: Which part of the data.
        norm: The threat's norm.
        eps: Its radius, a number or a fraction.
        dataset: A data set by name, in place of the run's.
        dataset_options: Its options.
        data_dir: Where its files are.
        weights_file: For a function: a file of weights for the model that it makes.
        model_options: For a function: what to call it with.
    """

    weights: Weights = "reported"
    checkpoint: Which = "final"
    part: PartName = "test"
    norm: Norm | None = None
    eps: Any = None
    dataset: str | None = None
    dataset_options: Mapping[str, Any] | None = None
    data_dir: Path | None = None
    weights_file: Path | None = None
    model_options: Mapping[str, Any] | None = None


def find_subject(source: str, wanted: Wanted | None = None) -> Subject:
    """Bring model, images and threat together.

    Args:
        source: A run directory, a checkpoint file, or ``package.module:function`` for a function that makes a model.
        wanted: What the user says besides.

    Raises:
        InputError: Something is missing or does not fit; the message says what.
    """
    wanted = wanted or Wanted()
    path = Path(source)
    if ":" in source and not path.exists():
        return _made(source, wanted)
    if wanted.weights_file or wanted.model_options:
        raise OptionError("--weights-file and -N are for models made by package.module:function, not for runs.")
    stored = stored_weights(path, wanted.weights, wanted.checkpoint)
    recipe = stored.recipe
    data = _named_data(wanted) if wanted.dataset else _run_data(recipe, wanted)
    return Subject(
        model=stored.network(),
        part=_part(data, wanted.part),
        threat=_threat(wanted, recipe.threat),
        facts={"checkpoint": str(stored.path), "weights": stored.kind, **_facts(wanted, recipe, data)},
        data=data,
        run=stored.run.path if stored.run else None,
        threads=recipe.threads,
    )


def _made(source: str, wanted: Wanted) -> Subject:
    """Anyone's model; it gets images in [0, 1] and normalises them itself."""
    if wanted.dataset is None or wanted.norm is None or wanted.eps is None:
        raise OptionError(f"{source} says nothing of data and threat: give --dataset, --norm and --eps.")
    data = _named_data(wanted)
    with fenced_randomness(0, "weights"):  # of a model that gets no file of them
        architecture = registry.create("models", source, wanted.model_options)
        model = architecture.build(data.shape, data.num_classes).eval()
    if wanted.weights_file:
        load_weights(model, wanted.weights_file)
    return Subject(
        model=model,
        part=_part(data, wanted.part),
        threat=_threat(wanted, None),
        facts={"checkpoint": str(wanted.weights_file or source), "weights": source, **_facts(wanted, None, data)},
        data=data,
    )


def load_weights(model: nn.Module, file: Path) -> None:
    """Load weights into a model, from what ``torch.save`` wrote of a state dict, or from safetensors.

    A state dict may lie under a key such as ``state_dict``, and its names may begin with ``module.``.

    Raises:
        CheckpointError: The file is missing, unreadable, holds code (which is not run), or does not fit the model.
    """
    state = _safetensors(file) if file.suffix == ".safetensors" else checkpoint.read(file, "file of weights")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{file} holds no state dict.")
    for key in ("state_dict", "model_state_dict", "model", "net", "raw"):
        if isinstance(state.get(key), dict):
            state = state[key]
    with checkpoint.fitting(file):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not fit the model: {error}") from None


def _safetensors(file: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file

        return cast(dict[str, Any], load_file(file))
    except ModuleNotFoundError:
        raise CheckpointError(f"{file} needs safetensors: python -m pip install safetensors.") from None
    except Exception as error:  # as for any other file
        raise CheckpointError(f"{file} is no safetensors file, or a damaged one ({error}).") from None


def _named_data(wanted: Wanted) -> Data:
    dataset: Dataset = registry.create("datasets", str(wanted.dataset), wanted.dataset_options)
    images = dataset.load(wanted.data_dir.expanduser().absolute() if wanted.data_dir else None)
    if wanted.part == "val":
        raise OptionError("a data set by name has no validation part; choose --part test or train.")
    check(images.train, images.train_labels, images.num_classes, "training set")
    if len(images.test_labels):
        check(images.test, images.test_labels, images.num_classes, "test set")
    test, train = Part(images.test, images.test_labels), Part(images.train, images.train_labels)
    return Data(train, Part(train.images[:0], train.labels[:0]), test, images.num_classes)


def _run_data(recipe: Recipe, wanted: Wanted) -> Data:
    if wanted.dataset_options:
        raise OptionError("-D changes the data set: name it too, with --dataset.")
    return prepare_data(recipe.replacing(data_dir=wanted.data_dir) if wanted.data_dir else recipe)


def _part(data: Data, name: PartName) -> Part:
    if name not in get_args(PartName):
        raise InputError(f"there is no part {name!r}. Parts: {', '.join(get_args(PartName))}.")
    part: Part = getattr(data, name)
    if part.n == 0:
        raise InputError(f"the data set has no {name} images. Choose another --part.")
    return part


def _threat(wanted: Wanted, trained: Threat | None) -> Threat:
    if trained is None or (wanted.norm and wanted.norm != trained.norm):
        if wanted.norm is None or wanted.eps is None:
            raise OptionError("another norm needs its own radius: give --eps.")
        return Threat(wanted.norm, wanted.eps)
    return Threat(trained.norm, trained.eps if wanted.eps is None else wanted.eps)


def _facts(wanted: Wanted, recipe: Recipe | None, data: Data) -> dict[str, Any]:
    """Which images; the fingerprint is that of a run's checkpoints where they are the run's own."""
    dataset = wanted.dataset or (recipe.dataset if recipe else None)
    return {"dataset": dataset, "part": wanted.part, "fingerprint": data.fingerprint()}
