"""Labelled images, looked at before anything is trained on them: what is refused, and what is only said."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from at_smooth.exceptions import DataError
from at_smooth.interfaces import Images
from at_smooth.notes import notify

_MOST_CLASSES = 100_000
_USUAL_CHANNELS = (1, 3, 4)
_GREY_LEVEL = 1 / 255
_DIM = 1 / 8  # a whole set without one pixel brighter than this was hardly meant so
_NOTABLE_SHARE = 0.01  # published sets have some duplicates, below one in a hundred
_MOST_NAMED = 10  # classes in a message


def check(images: Images) -> None:
    """Refuse what training would only trip over later, and notify of what is allowed but may not be meant.

    Raises:
        DataError: A shape, a label or a pixel value is wrong; the message names the first offender.
    """
    parts = [("training set", images.train, images.train_labels)]
    if images.val is not None and images.val_labels is not None:
        parts.append(("validation set", images.val, images.val_labels))
    if len(images.test_labels) or len(images.test):
        parts.append(("test set", images.test, images.test_labels))
    for name, pixels, labels in parts:
        _check_shape(name, pixels, labels, images.channels)
        _check_labels(name, labels, images.num_classes)
        _check_values(name, pixels)
        if pixels.shape[1:] != images.train.shape[1:]:
            raise DataError(
                f"training images are {_size(images.train)}, {name.removesuffix(' set')} images {_size(pixels)}: "
                f"make them one size."
            )
    for text in _remarks(images, parts):
        notify(text)


def _check_shape(name: str, images: Tensor, labels: Tensor, channels: int | None) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise DataError(f"{name}: images have shape {shape}; give (N, C, H, W).")
    if labels.ndim == 2:
        raise DataError(
            f"{name}: labels have shape {tuple(labels.shape)}; give one class number an image. Where they are one-hot, "
            f"that is labels.argmax(1)."
        )
    if len(images) != len(labels) or labels.ndim != 1:
        raise DataError(
            f"{name}: {len(images)} images but labels of shape {tuple(labels.shape)}; give one label an image."
        )
    if len(labels) == 0:
        raise DataError(f"{name}: there are no images.")
    if 0 in shape:
        raise DataError(f"{name}: images have shape {shape}, without a single pixel.")
    if channels is not None and shape[1] != channels:
        raise DataError(f"{name}: images have shape {shape}, so {shape[1]} channels, where {channels} are declared.")
    if channels is None and shape[1] not in _USUAL_CHANNELS:
        last = ". Where channels come last, give images.permute(0, 3, 1, 2)" if shape[3] in _USUAL_CHANNELS else ""
        raise DataError(
            f"{name}: images have shape {shape}, so {shape[1]} channels, which is unusual{last}. Where {shape[1]} "
            f"channels are meant, declare them: Images(..., channels={shape[1]})."
        )


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point():
        where = int((~labels.isfinite() | (labels != labels.round())).nonzero()[0])
        raise DataError(
            f"{name}: label {_exact(labels[where])} of example {where} is no whole number; labels are class numbers "
            f"from 0."
        )
    if num_classes < 2:
        raise DataError(f"{name}: there is one class, so nothing to tell apart. Give at least two.")
    if num_classes > _MOST_CLASSES:
        raise DataError(
            f"{name}: labels up to {num_classes - 1} are too many classes. Number them from 0 without gaps."
        )
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        where = int(outside[0])
        from_1 = int(labels.min()) == 1 and int(labels.max()) == num_classes
        advice = "The labels seem to begin at 1: subtract 1." if from_1 else "Remove it, or give more classes."
        raise DataError(
            f"{name}: label {int(labels[where])} of example {where} is outside the {num_classes} classes "
            f"0 to {num_classes - 1}. {advice}"
        )


def _check_values(name: str, images: Tensor) -> None:
    if images.dtype == torch.uint8:
        if int(images.max()) == 1:
            raise DataError(
                f"{name}: all pixels are 0 or 1 of 255, so nearly black. Where 1 means white, give 255 * images."
            )
        return
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise DataError(
            f"{name}: images are {kind}; give uint8 (0 to 255), or float in [0, 1]. {_advice_for_integers(images)}"
        )
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise DataError(
            f"{name}: pixel values run from {_exact(low)} to {_exact(high)}, outside [0, 1]. "
            f"{_advice_for_floats(images, float(low), float(high))}"
        )
    if 0 < float(high) <= _GREY_LEVEL * 1.001:
        raise DataError(
            f"{name}: no pixel is above {_exact(high)}, so all are nearly black. Were they divided by 255 twice?"
        )


def _advice_for_integers(images: Tensor) -> str:
    if images.dtype == torch.bool:
        return "Where True means white, give images.astype('float32') (or .float())."
    values = images.long()  # torch knows little about uint16
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 255:
        return f"Their values run from {low} to {high}: store them as uint8."
    if low >= 0 and high <= 65535:
        return f"Their values run from {low} to {high}: give float32, divided by 65535 (or what white is)."
    return f"Their values run from {low} to {high}."


def _advice_for_floats(images: Tensor, low: float, high: float) -> str:
    broken = (~images.isfinite()).flatten(1).any(1)
    if broken.any():
        return f"{int(broken.sum())} images hold NaN or infinity, the first is number {int(broken.nonzero()[0])}."
    if low >= -0.01 and high <= 1.01:
        return "Clip them: images.clip(0, 1)."
    if low >= 0 and high <= 255:
        return "Divide by 255, or store uint8."
    if low >= -1 and high <= 1:
        return "Where they were scaled to [-1, 1], give (images + 1) / 2; normalisation belongs inside the model."
    return "Undo their normalisation, which belongs inside the model."


def _remarks(images: Images, parts: list[tuple[str, Tensor, Tensor]]) -> Iterator[str]:
    present = {name: torch.bincount(labels, minlength=images.num_classes) > 0 for name, _, labels in parts}
    absent = (~present["training set"]).nonzero().flatten().tolist()
    if absent:
        yield f"no training image is of {_classes(absent, images.num_classes)}"
    if "test set" in present:
        missing = (present["training set"] & ~present["test set"]).nonzero().flatten().tolist()
        if missing:
            yield f"no test image is of {_classes(missing, images.num_classes)}"
        if images.test.dtype != images.train.dtype:
            kinds = [str(each.dtype).removeprefix("torch.") for each in (images.train, images.test)]
            yield (
                f"training images are {kinds[0]}, test images {kinds[1]}: uint8 is divided by 255, float taken as it is"
            )
        both = _duplicates(images.train, images.test)
        if both >= _NOTABLE_SHARE * len(images.test):
            yield f"{both} of the {len(images.test)} test images are also among the training images"
    for name, pixels, _ in parts:
        white = 255 if pixels.dtype == torch.uint8 else 1
        if 0 < float(pixels.max()) < _DIM * white:
            yield f"{name}: the brightest pixel is {_exact(pixels.max())}, where white is {white}"


def _classes(numbers: list[int], num_classes: int) -> str:
    named = ", ".join(str(number) for number in numbers[:_MOST_NAMED]) + ", ..." * (len(numbers) > _MOST_NAMED)
    return f"class{'es' * (len(numbers) > 1)} {named} ({len(numbers)} of the {num_classes} classes)"


def _duplicates(train: Tensor, test: Tensor) -> int:
    """How many test images are pixel for pixel among the training images."""
    if train.dtype != test.dtype:
        return 0
    known = {hash(image.tobytes()) for image in train.cpu().numpy()}  # 64 bits
    return sum(hash(image.tobytes()) in known for image in test.cpu().numpy())


def _exact(value: Tensor) -> str:
    """A number with all its digits, and no more than its type has."""
    return str(value.cpu().float().numpy()) if value.dtype == torch.bfloat16 else str(value.cpu().numpy())


def _size(images: Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])
