"""``at-smooth evaluate``: which examples a model still gets right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import (
    CARRIES_ON,
    evaluator_options,
    evaluators_from,
    json_option,
    labels_of,
    subject_options,
    trust_option,
    wanted_from,
)


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT|MODULE:FUNCTION")
@evaluator_options
@subject_options
@trust_option
@json_option
def evaluate(
    source: str,
    with_: tuple[str, ...],
    options: tuple[str, ...],
    n_examples: int | None,
    seed: int,
    batch_size: int | None,
    device: str,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Measure the accuracy of a model under attack.

    The model is a run's, a checkpoint's, or that of a function of yours. Interrupted, the same command carries on.
    """
    names = labels_of(with_ or ("clean", "pgd"))
    evaluators = evaluators_from(names, options)

    from at_smooth import evaluation
    from at_smooth.evaluation_progress import shown
    from at_smooth.files import is_standard_output, refuse_taken_file
    from at_smooth.journal import Journal
    from at_smooth.results import keep_in_run, print_results, report, write_json
    from at_smooth.runtime import Runtime, limited_threads
    from at_smooth.subject import find_subject
    from at_smooth.teacher_cache import cache_directory
    from at_smooth.terminal import Console

    refuse_taken_file(json_file)
    subject = find_subject(source, wanted_from(given)).subset(n_examples, seed)
    console = Console(stderr=is_standard_output(json_file))
    journal = Journal(cache_directory() / "evaluations")
    size = evaluation.BATCH_SIZE if batch_size is None else batch_size
    with interruptible(lambda: CARRIES_ON), limited_threads(subject.threads), shown(console) as watcher:
        found = evaluation.evaluate(
            subject.model,
            subject.part,
            evaluators,
            subject.threat,
            batch_size=size,
            seed=seed,
            runtime=Runtime.choose(device),
            journal=journal,
            watcher=watcher,
        )
    results = found.results()
    for label, name in names.items():
        results[label].update(evaluator=name, options=evaluators[label].options())
    content = report(subject, results, seed=seed, batch_size=size)
    print_results(console, content)
    if subject.run:
        kept = keep_in_run(subject.run, "evaluation", content)
        console.print(
            f"kept in {kept}" if kept else f"not kept in {subject.run}: it cannot be written to", soft_wrap=True
        )
    if json_file:
        write_json(json_file, content)
    journal.close()
