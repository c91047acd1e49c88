"""``model.py``: the definition of a trained network, which needs torch and nothing of at-smooth."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from at_smooth import registry
from at_smooth.exceptions import ExportError
from at_smooth.export.construction import Construction, named_arguments, render
from at_smooth.export.definitions import Definitions, UnwritableError
from at_smooth.export.trained import Trained
from at_smooth.factory import Factory
from at_smooth.interfaces import Architecture
from at_smooth.runtime import fenced_randomness

WEIGHTS = "weights.pt"

_TEMPLATE = '''"""{title}.

{needs}
``load_model()`` gives the network in eval mode, from images {shape} in [0, 1] to logits (N, {classes}).
"""

from __future__ import annotations

{imports}

{definitions}


class _Normalize(nn.Module):
    """Subtracts the mean and divides by the standard deviation, by channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class RobustModel(nn.Module):
    """From images {shape} in [0, 1] to logits (N, {classes}); its weights are untrained."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = _Normalize({mean}, {std})
        self.network = {network}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalize(images))


def load_model(path: str | Path = Path(__file__).with_name("{weights}")) -> nn.Module:
    """The trained network, in eval mode, on the CPU."""
    model = RobustModel()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
'''
_RESERVED = ("_Normalize", "RobustModel", "load_model")


def write_model(trained: Trained, folder: Path) -> set[str]:
    """Write ``model.py`` and ``weights.pt``, and see that they give the logits that the network gives.

    Returns:
        The packages beside torch that they need.

    Raises:
        ExportError: The architecture cannot be written as code, or what was written is not the same network.
    """
    with (folder / WEIGHTS).open("wb") as file:  # torch's own writer would end the process where the disk is full
        torch.save({name: tensor.clone() for name, tensor in trained.network.state_dict().items()}, file)
    reasons = []
    for attempt in _attempts(trained):
        try:
            written = attempt()
            (folder / "model.py").write_text(written.text, encoding="utf-8")
            _check(folder, trained)
            return written.requirements
        except UnwritableError as error:
            reasons.append(str(error))
    raise ExportError(
        f"the model '{trained.recipe.model}' cannot be written as code that stands alone: "
        f"{'; '.join(dict.fromkeys(reasons))}. Export it with --format torchscript, which needs no code."
    )


@dataclass(frozen=True)
class _Written:
    text: str
    requirements: set[str]


def _attempts(trained: Trained) -> Iterator[Callable[[], _Written]]:
    """Ways to write the network: the call of the function that makes it, or that of its constructor."""
    recipe = trained.recipe
    architecture: Architecture = registry.build("models", recipe.model, recipe.model_options)
    if isinstance(architecture, Factory):
        function, arguments = architecture.call(trained.shape, trained.num_classes)

        def by_function() -> _Written:
            definitions = _definitions(function.__module__)
            named = named_arguments(arguments, lambda value: render(value, definitions))
            return _fill_in(trained, f"{definitions.name_of(function)}({', '.join(named)})", definitions)

        yield by_function

    def by_constructor() -> _Written:
        with fenced_randomness(recipe.seed, "export"):
            construction = Construction(lambda: architecture.build(trained.shape, trained.num_classes))
        home = architecture.call(trained.shape, trained.num_classes)[0] if isinstance(architecture, Factory) else None
        definitions = _definitions((home or type(architecture)).__module__)
        return _fill_in(trained, construction.expression(definitions), definitions)

    yield by_constructor


def _definitions(module: str) -> Definitions:
    definitions = Definitions(own=[module.partition(".")[0]], reserved=_RESERVED)
    definitions.bring("torch", "torch", "import torch")
    definitions.bring("nn", "torch.nn", "from torch import nn")
    definitions.bring("Path", "pathlib.Path", "from pathlib import Path")
    return definitions


def _fill_in(trained: Trained, expression: str, definitions: Definitions) -> _Written:
    imports, source = definitions.text()
    state = trained.network.state_dict()
    mean, std = ([float(f"{value:.9g}") for value in state[f"normalize.{name}"].flatten()] for name in ("mean", "std"))
    requirements = sorted(definitions.requirements)
    text = _TEMPLATE.format(
        title=trained.title,
        needs=f"Needs {' and '.join(['torch', *requirements])}, and {WEIGHTS} beside it.",
        shape=f"(N, {', '.join(map(str, trained.shape))})",
        classes=trained.num_classes,
        imports=imports,
        definitions=f"\n{source}" if source else "",
        mean=mean,
        std=std,
        network=textwrap.indent(expression, " " * 8).lstrip(),
        weights=WEIGHTS,
    )
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return _Written(text, set(requirements))


def _check(folder: Path, trained: Trained) -> None:
    """See that the folder's model gives the logits that the network gives.

    Raises:
        UnwritableError: It does not.
    """
    try:
        with fenced_randomness(trained.recipe.seed, "export"):
            logits = _logits(folder / "model.py", trained.images)
    except UnwritableError:
        raise
    except Exception as error:  # code torn from its module may fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnwritableError(f"what was written fails ({reason})") from None
    if not torch.equal(logits, trained.logits):
        raise UnwritableError("what was written gives other logits; something about the network is not in its code")


def _logits(path: Path, images: Tensor) -> Tensor:
    name = f"_at_smooth_export_{id(path)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnwritableError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        model: nn.Module = module.load_model()
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits
    finally:
        sys.dont_write_bytecode = writes
        del sys.modules[name]
