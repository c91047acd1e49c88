"""``at-smooth audit``: is this robustness real?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import CARRIES_ON, json_option, pairs_of, subject_options, trust_option, wanted_from


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT|MODULE:FUNCTION")
@click.option("--set", "limits", metavar="KEY=VALUE", multiple=True,
              help="A limit or a setting of the checks, such as gain=10 (see docs/evaluation.md).")  # fmt: skip
@subject_options
@trust_option
@json_option
def audit(
    source: str,
    limits: tuple[str, ...],
    n_examples: int | None,
    seed: int,
    batch_size: int | None,
    device: str,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Look for masked gradients: robustness that is only that of the attack's gradients.

    Nine checks, a verdict each; exit code 0 when all find the model sound, 4 when one does not. On 200 examples unless
    --n-examples says otherwise.
    """
    from pydantic import ValidationError

    from at_smooth import audit as audits
    from at_smooth.audit_bench import Limits
    from at_smooth.evaluation_progress import shown
    from at_smooth.exceptions import MaskedGradientsError, OptionError, explain
    from at_smooth.files import is_standard_output, refuse_taken_file
    from at_smooth.journal import Journal
    from at_smooth.results import keep_in_run, print_audit, report, write_json
    from at_smooth.runtime import Runtime, limited_threads
    from at_smooth.subject import find_subject
    from at_smooth.teacher_cache import cache_directory
    from at_smooth.terminal import Console

    refuse_taken_file(json_file)
    try:
        settings = Limits(**pairs_of(limits))
    except ValidationError as error:
        raise explain(error, "audit") from None
    everything = find_subject(source, wanted_from(given))
    subject = everything.subset(min(audits.EXAMPLES, everything.part.n) if n_examples is None else n_examples, seed)
    if subject.part.n < audits.FEWEST:
        raise OptionError(f"--n-examples: {subject.part.n} examples tell nothing; give {audits.FEWEST} or more.")
    console = Console(stderr=is_standard_output(json_file))
    journal = Journal(cache_directory() / "evaluations")
    with interruptible(lambda: CARRIES_ON), limited_threads(subject.threads), shown(console) as watcher:
        verdicts = audits.audit(
            subject.model,
            subject.part,
            subject.data.train,
            subject.threat,
            limits=settings,
            batch_size=batch_size,
            seed=seed,
            runtime=Runtime.choose(device),
            journal=journal,
            watcher=watcher,
        )
    results = {each.check: {"sound": each.sound, "found": each.found, **each.figures} for each in verdicts}
    failed = [each.check for each in verdicts if not each.sound]
    content = report(subject, results, sound=not failed, seed=seed, limits=settings.model_dump(mode="json"))
    print_audit(console, content)
    if subject.run:
        keep_in_run(subject.run, "audit", content)
    if json_file:
        write_json(json_file, content)
    journal.close()
    if failed:
        raise MaskedGradientsError(
            f"not sound: {', '.join(failed)}. The robust accuracy of this model should not be trusted as it is."
        )
