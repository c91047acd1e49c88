"""The inner maximisation of TRADES in L2, which torchattacks lacks (its ``TPGD`` is Linf only)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchattacks.attack import Attack


class TPGDL2(Attack):  # type: ignore[misc]  # torchattacks is untyped
    """Ascend KL(f(x) || f(x + d)) over the L2 ball: Eq. 7, from a start of 0.001 N(0, 1) as ``TPGD`` has it.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K).
        eps: Radius of the ball.
        alpha: Length of a step.
        steps: How many.
    """

    def __init__(self, model: nn.Module, eps: float = 1.0, alpha: float = 0.2, steps: int = 10) -> None:
        super().__init__("TPGDL2", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Perturb images (N, C, H, W); labels are not looked at."""
        images = images.clone().detach().to(self.device)
        with torch.no_grad():
            prediction = F.softmax(self.get_logits(images), dim=1)
        perturbed = (images + 0.001 * torch.randn_like(images)).clamp(0, 1)
        for _ in range(self.steps):
            perturbed.requires_grad_(True)
            divergence = F.kl_div(F.log_softmax(self.get_logits(perturbed), dim=1), prediction, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, perturbed)
            moved = perturbed.detach() + self.alpha * gradient / (_norms(gradient) + 1e-10)
            delta = moved - images
            delta = delta * (self.eps / (_norms(delta) + 1e-10)).clamp(max=1)
            perturbed = (images + delta).clamp(0, 1)
        return perturbed.detach()


def _norms(batch: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(batch, dim=(1, 2, 3), keepdim=True)
    return norms
