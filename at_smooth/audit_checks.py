"""The checks of an audit, one a function (after Carlini et al., "On evaluating adversarial robustness", 2019)."""

from __future__ import annotations

import math

import torch
from scipy.stats import binomtest
from torch import Tensor

from at_smooth.attacks import PGD, Adversary
from at_smooth.audit_bench import Bench, Check, Verdict
from at_smooth.confidence import wilson
from at_smooth.interfaces import Outcome, percent
from at_smooth.threat import format_pixels


def repeats(bench: Bench) -> Verdict:
    """The same images give the same logits; a random layer hides the gradient in noise."""
    with torch.no_grad():
        first, second = (torch.nn.functional.normalize(bench.model(bench.images)) for _ in range(2))
    apart = (first - second).norm(dim=1).max().item()
    sound = apart <= 1e-4  # as AutoAttack's own check has it
    words = "the same images give the same logits" if sound else "the same images give other logits each time: random"
    return Verdict("repeats itself", sound, words, {"largest_change": apart})


def gradients(bench: Bench) -> Verdict:
    """Hardly any example has an input gradient that is zero or not finite."""
    gradient = _gradient(bench, bench.images).flatten(1)
    useless = (gradient == 0).all(1) | ~gradient.isfinite().all(1)
    share = percent(useless)
    words = f"{share:.1f} % of the examples have a zero or non-finite gradient"
    return Verdict("gradients", not _exceeds(bench, share, bench.limits.zero), words, {"useless": share})


def slope(bench: Bench) -> Verdict:
    """A step along the gradient raises the loss, and more than a random step."""
    images, eps = bench.images, bench.threat.eps
    before = _loss(bench, images)
    rise = _loss(bench, images + eps * _step(bench, _gradient(bench, images))) - before
    random_rise = _loss(bench, images + eps * _step(bench, torch.randn_like(images))) - before
    flat = percent((rise <= 0) | (rise < random_rise))
    words = f"along the gradient the loss of {flat:.1f} % of the examples does not rise, or less than at random"
    figures = {"flat": flat, "rise": rise.mean().item(), "random_rise": random_rise.mean().item()}
    return Verdict("slope", not _exceeds(bench, flat, bench.limits.flat), words, figures)


def falls(bench: Bench) -> Verdict:
    """RA falls to about 0 when any image is allowed."""
    most = bench.usual(_radii(bench)[-1]).accuracy
    words = f"RA is {most:.1f} % where any image is allowed"
    return Verdict("falls to zero", not _exceeds(bench, most, bench.limits.left), words, {"ra_at_any_image": most})


def monotone(bench: Bench) -> Verdict:
    """A larger radius never helps the model."""
    accuracies = {eps: bench.usual(eps).accuracy for eps in _radii(bench)}
    values = list(accuracies.values())
    rise = max([later - earlier for i, earlier in enumerate(values) for later in values[i + 1 :]], default=0.0)
    words = ", ".join(f"{value:.1f} at {_short(eps)}" for eps, value in accuracies.items())
    figures = {"ra_by_eps": {str(format_pixels(eps)): value for eps, value in accuracies.items()}}
    return Verdict("monotone in eps", rise <= bench.limits.rise, f"RA, %: {words}", figures)


def converges(bench: Bench) -> Verdict:
    """More steps and restarts neither help the model nor hurt it much."""
    limits = bench.limits
    usual, longer, most = bench.usual(), bench.under(limits.attack, steps=limits.more_steps), bench.longest()
    helped, hurt = longer.accuracy - usual.accuracy, usual.accuracy - most.accuracy
    words = (
        f"RA {usual.accuracy:.1f} % under {limits.steps} steps, {longer.accuracy:.1f} under {limits.more_steps}, "
        f"{most.accuracy:.1f} with {limits.restarts} restarts"
    )
    figures = {"usual": usual.accuracy, "more_steps": longer.accuracy, "more_restarts": most.accuracy}
    return Verdict("steps and restarts", helped <= limits.rise and hurt <= limits.gain, words, figures)


def noise(bench: Bench) -> Verdict:
    """Random noise is no stronger than the white-box attack."""
    weak, strong = bench.under(bench.limits.noise), bench.usual()
    words = f"RA {weak.accuracy:.1f} % under random noise, {strong.accuracy:.1f} under PGD"
    return Verdict("noise", not _beats(weak, strong, bench.limits.beaten), words,
                   {"noise": weak.accuracy, "white_box": strong.accuracy})  # fmt: skip


def transfers(bench: Bench) -> Verdict:
    """Examples made on an imitation of the model are no stronger than those made on itself."""
    surrogate = bench.surrogate()
    spec = PGD(threat=bench.threat, steps=bench.limits.steps, mode="eval")
    perturbed = Adversary(surrogate, spec)(bench.images, bench.part.labels)
    with torch.no_grad():
        right = (bench.model(perturbed).argmax(1) == bench.part.labels).cpu()
        agree = percent(surrogate(bench.images).argmax(1) == bench.model(bench.images).argmax(1))
    strong = bench.usual()
    words = f"RA {percent(right):.1f} % under transfer from an imitation, {strong.accuracy:.1f} under PGD"
    figures = {"transfer": percent(right), "white_box": strong.accuracy, "imitation_agrees": agree}
    sound = not _surpasses(right, strong.standing, bench.limits.beaten)
    return Verdict("transfer", sound, words, figures)


def reference(bench: Bench) -> Verdict:
    """An ensemble of attacks, a gradient-free one among them, does not fall far below PGD."""
    longest, most = bench.longest(), bench.under(bench.limits.reference)
    words = f"RA {most.accuracy:.1f} % under {bench.limits.reference}, {longest.accuracy:.1f} under the longer PGD"
    figures = {"reference": most.accuracy, "white_box": longest.accuracy, "notes": most.notes}
    return Verdict(bench.limits.reference, not _beats(most, longest, bench.limits.gap), words, figures)


#: What an audit looks at, the cheapest first.
CHECKS: tuple[Check, ...] = (repeats, gradients, slope, falls, monotone, converges, noise, transfers, reference)


def _exceeds(bench: Bench, share: float, limit: float) -> bool:
    """Whether a share of the examples, in percent, is above a limit by more than chance allows."""
    return wilson(share, bench.part.n)[0] > limit


def _beats(one: Outcome, other: Outcome, points: float) -> bool:
    return _surpasses(one.standing, other.standing, points)


def _surpasses(right: Tensor, other: Tensor, points: float) -> bool:
    """Whether one attack breaks more than another by so many points, and by more than chance (McNemar's exact test)."""
    only, only_other = int((~right & other).sum()), int((right & ~other).sum())
    if 100 * (only - only_other) / len(right) <= points:
        return False
    return bool(binomtest(only, only + only_other, alternative="greater").pvalue < 0.025)


def _radii(bench: Bench) -> list[float]:
    """From half the radius up to where any image is allowed."""
    eps = bench.threat.eps
    most = 1.0 if bench.threat.norm == "Linf" else math.sqrt(bench.images[0].numel())
    return [*(factor * eps for factor in (0.5, 1, 2, 4) if factor * eps < most), most]


def _loss(bench: Bench, images: Tensor) -> Tensor:
    """The cross-entropy of each example, (N,)."""
    return torch.nn.functional.cross_entropy(bench.model(images), bench.part.labels, reduction="none")


def _gradient(bench: Bench, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(_loss(bench, images).sum(), images)[0]


def _step(bench: Bench, direction: Tensor) -> Tensor:
    """The step of length 1 in the threat's norm that a direction stands for."""
    if bench.threat.norm == "Linf":
        return direction.sign()
    return torch.nn.functional.normalize(direction.flatten(1)).view_as(direction)


def _short(eps: float) -> str:
    return f"{eps:.3g}"
