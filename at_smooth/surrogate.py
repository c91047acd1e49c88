"""A network that imitates another one, to attack that one without its gradients (Papernot et al., ASIACCS 2017)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from at_smooth import registry
from at_smooth.attacks import CLEAN, PGD, Clean
from at_smooth.contracts import learning_network_of
from at_smooth.data import Data, Part
from at_smooth.engine import Engine
from at_smooth.interfaces import Method
from at_smooth.normalize import Normalize
from at_smooth.plugin_errors import blamed
from at_smooth.runtime import Runtime, fenced_randomness
from at_smooth.settings import Settings
from at_smooth.threat import Threat

_IMAGES = 5000  # at most so many are learned from
_STEPS = 600  # about so many updates


class _Imitation(Method):
    """Cross-entropy with the imitated model's predictions, on images that nobody attacked."""

    def attack(self, wanted: object) -> Clean:
        return CLEAN

    def loss(
        self, model: nn.Module, clean: torch.Tensor, perturbed: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(clean)
        return nn.functional.cross_entropy(logits, targets), logits


def trained_surrogate(
    model: nn.Module, training: Part, num_classes: int, architecture: str, seed: int, runtime: Runtime
) -> nn.Module:
    """Train a network on the predictions of another.

    Args:
        model: Whose predictions are learned, in eval mode on the runtime's device.
        training: Images to learn them on; their labels are not looked at.
        num_classes: K.
        architecture: The name of the network's plugin.
        seed: Decides initial weights and order.
        runtime: The device.

    Returns:
        The network, in eval mode on that device; from images in [0, 1] to logits.
    """
    chosen = torch.randperm(training.n, generator=torch.Generator().manual_seed(seed))[:_IMAGES]
    images = training.images[chosen]
    unlabelled = Part(images, torch.zeros(len(images), dtype=torch.long)).to(runtime.device)
    with torch.no_grad():
        labels = torch.cat([model(batch.clean).argmax(1) for batch in unlabelled.batches(512)]).cpu()
    taught = Part(images, labels)
    data = Data(taught, Part(images[:2], labels[:2]), Part(images[:0], labels[:0]), num_classes, seed=seed)
    with fenced_randomness(seed, "surrogate"):
        plugin = registry.build("models", architecture)
        with blamed(plugin, "build"):
            built: object = plugin.build(data.shape, num_classes)
        network = learning_network_of(plugin, built)
    student = nn.Sequential(OrderedDict(normalize=Normalize(*data.pixel_statistics()), network=network))
    epochs = max(2, round(_STEPS * 64 / taught.n))
    settings = Settings(epochs=epochs, batch_size=64, lr=0.05, seed=seed, eval_steps=0, test_every=0,
                        validate_every=epochs)  # fmt: skip
    nothing = PGD(threat=Threat("Linf", 0), mode="eval")
    Engine(student, data, method=_Imitation(), attack=nothing, settings=settings,
           runtime=Runtime(runtime.device)).fit()  # fmt: skip
    return student.eval().requires_grad_(False)
