"""The forward and backward passes that a step of adversarial training cannot do without, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from at_smooth.attacks import PGD, attackable
from at_smooth.runtime import Runtime


def bare_step(model: nn.Module, images: Tensor, labels: Tensor, attack: PGD, runtime: Runtime) -> list[Tensor]:
    """As many passes as one step needs: no arithmetic of the attack, no update.

    The attack takes ``attack.steps`` times a forward pass and a backward pass to the images alone; the update one
    forward pass and one backward pass to the parameters.

    Args:
        model: From images to logits (N, K), in train mode; its parameters stay as they are.
        images: (N, C, H, W) in [0, 1], on the model's device.
        labels: (N,).
        attack: Says how many steps, and in which mode of the model.
        runtime: Says in which precision.

    Returns:
        The gradient of each parameter that the logits depend on.
    """
    wanted = images.detach().clone().requires_grad_()
    with attackable(model, attack.mode), runtime.attacking(model):
        for _ in range(attack.steps):
            seen = wanted.view_as(wanted)  # torch's counter cannot have a leaf for a module's input
            loss = F.cross_entropy(model(seen).float(), labels)
            torch.autograd.grad(loss, wanted)
    with runtime.autocast():
        loss = F.cross_entropy(model(images), labels)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, learning, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def step_flops(model: nn.Module, images: Tensor, labels: Tensor, attack: PGD, runtime: Runtime) -> int:
    """Floating-point operations of :func:`bare_step`, a multiplication and an addition counted as two.

    torch counts convolutions and matrix products; what is done element by element is not counted.
    """
    with FlopCounterMode(display=False) as counter:
        bare_step(model, images, labels, attack, runtime)
    return int(counter.get_total_flops())
