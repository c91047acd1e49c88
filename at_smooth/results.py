"""What an evaluation found: as JSON, in a run's directory, and as a table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from rich import box
from rich.table import Table
from rich.text import Text

from at_smooth import records
from at_smooth._version import __version__
from at_smooth.exceptions import FileError, StorageError
from at_smooth.files import create, create_first_free
from at_smooth.reading import json_of
from at_smooth.subject import Subject
from at_smooth.terminal import Console
from at_smooth.threat import Threat

Report = dict[str, Any]
Kind = Literal["evaluation", "audit"]

_SCHEMAS: dict[Kind, type[BaseModel]] = {"evaluation": records.Evaluation, "audit": records.Audit}


def report(subject: Subject, results: Mapping[str, Any], **circumstances: Any) -> Report:
    """What ``--json`` writes, in plain types."""
    return {
        "n": subject.part.n,
        "threat": {"norm": subject.threat.norm, "eps": subject.threat.eps},
        **subject.facts,
        **circumstances,
        "at-smooth": __version__,
        "results": dict(results),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a report whole, to a file that is new, or to a device or a FIFO.

    Raises:
        TakenError: The file is there by now.
        StorageError: It cannot be written.
    """
    create(path, _json(content))


def keep_in_run(run: Path, kind: Kind, content: Mapping[str, Any]) -> Path | None:
    """Put a report among the run's own, under ``evaluations/``, by a name that nothing has.

    Returns:
        Where, or None where the run's folder cannot be written to.
    """
    moment = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = run / "evaluations"
    try:
        folder.mkdir(exist_ok=True)
        return create_first_free((folder / f"{kind}-{moment}-{n:03d}.json" for n in itertools.count(1)), _json(content))
    except (OSError, StorageError):
        return None


def kept_in_run(run: Path, kind: Kind, left_out: Callable[[FileError], None] = lambda error: None) -> list[Report]:
    """The reports of a kind that a run keeps, oldest first.

    Args:
        run: The run's folder.
        kind: Which.
        left_out: Told of each file that cannot be read, or does not hold such a report.
    """
    reports = []
    for path in sorted((run / "evaluations").glob(f"{kind}-*.json"), key=lambda path: path.stem):
        try:
            reports.append(json_of(path, _SCHEMAS[kind]))
        except FileError as error:
            left_out(error)
    return reports


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def print_results(console: Console, content: Mapping[str, Any]) -> None:
    """The table that ends an evaluation, and what the evaluators had to say."""
    threat = Threat(**content["threat"])
    weights = "" if content["weights"] == content["checkpoint"] else f" ({content['weights']} weights)"
    console.print(Text.assemble((content["checkpoint"], "bold"), weights), soft_wrap=True)
    title = f"{content['n']} {content['part']} examples of {content['dataset']}, {threat}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    table.add_column("evaluator", overflow="fold")
    for column in ("accuracy, %", "95 % interval", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in content["results"].items():
        low, high = result["ci95"]
        table.add_row(name, f"{result['accuracy']:.2f}", f"{low:.2f} to {high:.2f}", f"{result['seconds']:.1f}")
    console.print(table)
    for name, result in content["results"].items():
        for line in _details(result):
            console.print(f"{name}: {line}", soft_wrap=True)


def print_transfer(console: Console, content: Mapping[str, Any]) -> None:
    """The matrix of a transfer: a row a source, a column a target, the interval below each accuracy."""
    threat, results = Threat(**content["threat"]), content["results"]
    title = (
        f"accuracy, % (95 % interval), of {content['n']} {content['part']} examples of {content['dataset']}, {threat}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    table.add_column("made on", overflow="fold")
    targets = list(content["runs"])
    for number, _ in enumerate(targets, start=1):
        table.add_column(f"judged on {number}", justify="right", no_wrap=True)
    for source, row in results.items():
        label = f"{targets.index(source) + 1} {source}" if source in targets else "(clean images)"
        table.add_row(label, *(_with_interval(row[target]) for target in targets))
    console.print(table)
    attack = content["attack"]
    options = ", ".join(f"{name} {value}" for name, value in attack.items() if name not in ("name", "mode"))
    console.print(
        f"attack: {attack['name']} ({options}); on the diagonal each model is attacked itself", soft_wrap=True
    )


def print_audit(console: Console, content: Mapping[str, Any]) -> None:
    """The verdicts of an audit, and the one over all."""
    threat = Threat(**content["threat"])
    console.print(Text.assemble((content["checkpoint"], "bold"), f" ({content['weights']})"), soft_wrap=True)
    title = f"audit on {content['n']} {content['part']} examples of {content['dataset']}, {threat}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for name, result in content["results"].items():
        verdict = Text("sound", "green") if result["sound"] else Text("NOT SOUND", "bold red")
        table.add_row(name, verdict, result["found"])
    console.print(table)
    if content["sound"]:
        console.print("sound: nothing here speaks for masked gradients")


def _with_interval(result: Mapping[str, Any]) -> str:
    low, high = result["ci95"]
    return f"{result['accuracy']:.2f}\n{low:.1f} to {high:.1f}"


def _details(result: Mapping[str, Any]) -> Iterator[str]:
    if "of" in result:
        yield f"right under each of {', '.join(result['of'])}"
    if "broke" in result:
        yield "broke " + ", ".join(f"{count} ({stage})" for stage, count in result["broke"].items())
    shown = {"accuracy", "ci95", "seconds", "broke", "notes", "of", "evaluator", "options"}
    figures = [f"{_words(name)} {_value(value)}" for name, value in result.items() if name not in shown]
    if figures:
        yield ", ".join(figures)
    for note in result.get("notes", []):
        yield f"note: {note}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name}: {_value(part)}" for name, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
