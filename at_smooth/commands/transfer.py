"""``at-smooth transfer``: adversarial examples made on one run and judged on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import json_option, pairs_of, subject_options, trust_option, wanted_from


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--attack", default="pgd", show_default=True, help="Attack, or torchattacks:CLASS.")
@click.option("-A", "attack_options", metavar="KEY=VALUE", multiple=True, help="Option of the attack. [default: "
              "steps=20 for pgd]")  # fmt: skip
@subject_options
@trust_option
@json_option
def transfer(
    runs: tuple[str, ...],
    attack: str,
    attack_options: tuple[str, ...],
    n_examples: int | None,
    seed: int,
    batch_size: int | None,
    device: str,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Make adversarial examples on each RUN and judge them on all: rows are attacked, columns judge."""
    from at_smooth import transfer as transfers
    from at_smooth.attacks import AttackSpec
    from at_smooth.evaluation import BATCH_SIZE
    from at_smooth.evaluation_progress import shown
    from at_smooth.exceptions import InputError
    from at_smooth.files import is_standard_output, refuse_taken_file
    from at_smooth.results import print_transfer, report, write_json
    from at_smooth.runtime import Runtime, limited_threads
    from at_smooth.subject import find_subject
    from at_smooth.terminal import Console

    refuse_taken_file(json_file)
    if len(set(runs)) < len(runs) or transfers.CLEAN in runs:
        raise InputError(f"each run once, and none named '{transfers.CLEAN}': {', '.join(runs)}.")
    wanted = wanted_from(given)
    subjects = {run: find_subject(run, wanted).subset(n_examples, seed) for run in runs}
    part = transfers.common_part(subjects)
    first = next(iter(subjects.values()))
    usual = {"steps": 20} if attack == "pgd" else {}
    spec = AttackSpec.parse(attack, first.threat, {**usual, **pairs_of(attack_options), "mode": "eval"})
    console = Console(stderr=is_standard_output(json_file))
    size = BATCH_SIZE if batch_size is None else batch_size
    with interruptible(lambda: "nothing was written"), limited_threads(first.threads), shown(console) as watcher:
        found = transfers.transfer(
            {run: subject.model for run, subject in subjects.items()},
            part,
            spec,
            batch_size=size,
            seed=seed,
            runtime=Runtime.choose(device),
            watcher=watcher,
        )
    chosen = {
        "runs": {run: subject.facts["checkpoint"] for run, subject in subjects.items()},
        "attack": {"name": spec.name, **spec.options()},
        "seed": seed,
        "batch_size": size,
    }
    content = report(first, found.results(), **chosen)
    print_transfer(console, content)
    if json_file:
        write_json(json_file, content)
