"""Networks without code: TorchScript and ONNX, by tracing."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_smooth.exceptions import ExportError
from at_smooth.export.trained import Trained

TORCHSCRIPT = "model.pt"
ONNX = "model.onnx"

_TRACED_ON = 2  # images; the comparison takes another number


def write_torchscript(trained: Trained, folder: Path) -> set[str]:
    """Trace the network into ``model.pt``.

    Raises:
        ExportError: It cannot be traced, or the trace gives other logits.
    """
    jit: Any = torch.jit  # without annotations, in some versions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own format, and warns of every branch on a shape
        try:
            written = io.BytesIO()
            jit.save(jit.trace(trained.network, trained.images[:_TRACED_ON]), written)
            with torch.no_grad():
                logits = jit.load(io.BytesIO(written.getvalue()))(trained.images)
        except Exception as error:  # whatever the network's code does to the tracer
            raise ExportError(f"'{trained.recipe.model}' cannot be traced ({_first_line(error)}).") from None
    _compare(logits, trained, "TorchScript")
    (folder / TORCHSCRIPT).write_bytes(written.getvalue())  # torch's own writer aborts the process on a full disk
    return set()


def write_onnx(trained: Trained, folder: Path) -> set[str]:
    """Write the network to ``model.onnx``.

    Raises:
        ExportError: A package is missing, the network cannot be converted, or gives other logits.
    """
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"--format onnx needs packages that at-smooth does not depend on. Install them: "
            f"python -m pip install {' '.join(missing)}"
        )
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise ExportError(f"--format onnx needs a newer torch than {torch.__version__}; 2.5 will do.")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                trained.network,
                (trained.images[:_TRACED_ON],),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            from onnx.reference import ReferenceEvaluator

            content = program.model_proto
            [logits] = ReferenceEvaluator(content).run(None, {"images": trained.images.numpy()})
        except Exception as error:  # as above
            raise ExportError(f"'{trained.recipe.model}' cannot be written as ONNX ({_first_line(error)}).") from None
    _compare(torch.as_tensor(logits), trained, "ONNX")
    (folder / ONNX).write_bytes(content.SerializeToString())
    return {"onnxruntime"}


def _compare(logits: Tensor, trained: Trained, what: str) -> None:
    """Other orders of summation round differently; anything more is another network."""
    if logits.shape != trained.logits.shape or not torch.allclose(logits, trained.logits, rtol=1e-4, atol=1e-4):
        raise ExportError(
            f"as {what} the model gives other logits: its path through the code depends on the images, which a trace "
            f"does not hold. Export it with --format robustbench."
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
