"""Is a model's robustness real, or are its gradients masked?"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from at_smooth import registry
from at_smooth.audit_bench import Bench, Limits, Verdict
from at_smooth.audit_checks import CHECKS
from at_smooth.data import Part
from at_smooth.evaluation import BATCH_SIZE, Watcher, classes_of, evaluate, frozen_copy, own_arithmetic
from at_smooth.interfaces import Evaluator, Outcome
from at_smooth.journal import Journal
from at_smooth.runtime import Runtime, fenced_randomness
from at_smooth.surrogate import trained_surrogate
from at_smooth.threat import Threat
from at_smooth.trust import trust_code

#: On how many examples an audit looks unless told otherwise.
EXAMPLES = 200

#: On fewer no difference between attacks could be told from chance.
FEWEST = 30


def audit(
    model: nn.Module,
    part: Part,
    training: Part,
    threat: Threat,
    *,
    limits: Limits | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    journal: Journal | None = None,
    watcher: Watcher | None = None,
) -> list[Verdict]:
    """Look for signs that a model's robustness is only that of its gradients (Athalye et al., ICML 2018).

    Nothing of the caller's changes.

    Args:
        model: From images (N, C, H, W) in [0, 1] to logits (N, K).
        part: The examples that it is audited on; a few hundred tell enough.
        training: Images on which a surrogate is trained; their labels are not looked at.
        threat: What the adversary may do.
        limits: When a check fails.
        batch_size: Images attacked at once; None for the usual number.
        seed: Decides every random draw.
        runtime: The device; the default is the best there is.
        journal: Remembers finished batches, so that the same call carries on after a kill.
        watcher: Told how it goes.

    Returns:
        A verdict a check; the model is sound where all are.

    Raises:
        OptionError: The model gives no logits, or the radius is 0.
    """
    limits, runtime = limits or Limits(), runtime or Runtime.choose()
    for evaluator in (limits.attack, limits.noise, limits.reference):
        registry.create("evaluators", evaluator).check(threat, 2)  # refused before anything costs time
    trust_code([limits.surrogate])
    registry.load("models", limits.surrogate)

    def attacked(label: str, evaluator: Evaluator, threat: Threat) -> Outcome:
        found = evaluate(subject, part, {label: evaluator}, threat, batch_size=batch_size or BATCH_SIZE, seed=seed,
                         runtime=runtime, journal=journal, watcher=watcher)  # fmt: skip
        return found.outcomes[label]

    with fenced_randomness(seed, "audit"), own_arithmetic(runtime.device):
        subject, part = _Connected(frozen_copy(model)).to(runtime.device), part.to(runtime.device)
        num_classes = classes_of(subject, part)
        imitate = partial(trained_surrogate, subject, training, num_classes, limits.surrogate, seed, runtime)
        bench = Bench(subject, part, threat, limits, attacked, imitate)
        return [check(bench) for check in CHECKS]


class _Connected(nn.Module):
    """A model that cuts its graph (rounding in NumPy, say) gets gradients of zero, which the checks then judge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if images.requires_grad and not logits.requires_grad:
            logits = logits + 0 * images.flatten(1).sum(1, keepdim=True)
        return logits
