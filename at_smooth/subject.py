"""What is evaluated: a model, images, and a threat; from a run, a checkpoint, or anyone's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from at_smooth import registry
from at_smooth.contracts import loaded, network_of
from at_smooth.data import Data, Part, stratified_subset
from at_smooth.data_checks import check
from at_smooth.exceptions import InputError, OptionError
from at_smooth.experiment import Weights, Which, prepare_data, stored_weights
from at_smooth.interfaces import Dataset
from at_smooth.plugin_errors import blamed
from at_smooth.recipe import Recipe
from at_smooth.runtime import fenced_randomness
from at_smooth.threat import Norm, Threat
from at_smooth.weights_file import load_weights

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
        weights_key: Which of the weights in that file.
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
    weights_key: str | None = None
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
    if wanted.weights_file or wanted.weights_key or wanted.model_options:
        raise OptionError(
            "--weights-file, --weights-key and -N are for models made by package.module:function, not for runs."
        )
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
    if wanted.weights_key and not wanted.weights_file:
        raise OptionError("--weights-key says which weights of a file: name it too, with --weights-file.")
    data = _named_data(wanted)
    with fenced_randomness(0, "weights"):  # of a model that gets no file of them
        architecture = registry.create("models", source, wanted.model_options)
        with blamed(architecture, "build"):
            model: object = architecture.build(data.shape, data.num_classes)
        model = network_of(architecture, model).eval()
    found = load_weights(model, wanted.weights_file, wanted.weights_key) if wanted.weights_file else None
    key = {"weights_key": found.key} if found and found.key else {}
    return Subject(
        model=model,
        part=_part(data, wanted.part),
        threat=_threat(wanted, None),
        facts={
            "checkpoint": str(wanted.weights_file or source),
            "weights": source,
            **key,
            **_facts(wanted, None, data),
        },
        data=data,
    )


def _named_data(wanted: Wanted) -> Data:
    dataset: Dataset = registry.create("datasets", str(wanted.dataset), wanted.dataset_options)
    images = loaded(dataset, wanted.data_dir.expanduser().absolute() if wanted.data_dir else None)
    check(images)
    test, train = Part(images.test, images.test_labels), Part(images.train, images.train_labels)
    val = Part(train.images[:0], train.labels[:0])
    if images.val is not None and images.val_labels is not None:
        val = Part(images.val, images.val_labels)
    elif wanted.part == "val":
        raise OptionError("this data set has no validation part of its own; choose --part test or train.")
    return Data(train, val, test, images.num_classes)


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
