"""What a report says of runs, as tables: results, evaluations, audits, recipes, environments, teachers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from at_smooth.exceptions import FileError
from at_smooth.following import Progress, teachers_of
from at_smooth.grouping import by_setting, recorded
from at_smooth.report import HEADER, comparison_rows, format_table
from at_smooth.results import kept_in_run
from at_smooth.run import Run
from at_smooth.tables import Table
from at_smooth.threat import Threat

#: What of an environment is said elsewhere.
_ELSEWHERE = ("command", "started", "seed")


def overview(runs: Sequence[Run]) -> Table:
    """Which runs there are, and how far they are."""
    rows: list[list[str]] = []
    marked = set()
    for label, group in by_setting(runs):
        for run in group:
            progress = Progress.of(run)
            if not progress.finished:
                marked.add((len(rows), 3))
            state = str(progress) if progress.finished else f"not finished: {progress}"
            rows.append([str(run.path), label, str(recorded(run).get("seed")), state, duration(progress.seconds)])
    columns = ["run", "setting", "seed", "state", "time"]
    return Table("runs", columns, rows, words=(0, 1, 3), marked=frozenset(marked))


def results(runs: Sequence[Run]) -> Table | None:
    """The paper's table of the finished runs; None where there are none."""
    finished = [run for run in runs if run.finished]
    if not finished:
        return None
    rows = comparison_rows(finished)
    notes = format_table(rows, "markdown").partition("\n\n")[2]
    return Table(
        "test accuracy of the reported weights, percent",
        HEADER,
        [[label, *map(str, cells)] for label, cells in rows],
        [note.removesuffix(".") for note in notes.splitlines()],
    )


def evaluations(runs: Sequence[Run]) -> Table | None:
    """What ``at-smooth evaluate`` found; of several of the same, that on the most examples, then the newest."""
    rows: list[list[str]] = []
    damaged: list[str] = []
    for run in runs:
        best: dict[tuple[Any, ...], dict[str, Any]] = {}
        for content in kept_in_run(run.path, "evaluation", _noting(damaged)):
            for evaluator in content["results"]:
                known = best.get(key := (*_subject(content), evaluator))
                if known is None or content["n"] >= known["n"]:
                    best[key] = content
        for (checkpoint, weights, threat, part, evaluator), content in sorted(best.items()):
            result = content["results"][evaluator]
            low, high = result["ci95"]
            interval = f"{low:.2f} to {high:.2f}"
            accuracy = f"{result['accuracy']:.2f}"
            model = f"{checkpoint}, {weights}"
            rows.append([str(run.path), model, threat, evaluator, accuracy, interval, f"{content['n']} {part}"])
    columns = ["run", "weights", "threat", "evaluator", "accuracy, %", "95 % interval", "examples"]
    return Table("evaluations", columns, rows, damaged, words=(0, 1, 2, 3)) if rows or damaged else None


def audits(runs: Sequence[Run]) -> Table | None:
    """What ``at-smooth audit`` found, the newest of each run and checkpoint; what is not sound is marked."""
    rows: list[list[str]] = []
    damaged: list[str] = []
    marked = set()
    for run in runs:
        kept = kept_in_run(run.path, "audit", _noting(damaged))
        newest = {_subject(content): content for content in kept}
        for (checkpoint, weights, threat, _), content in sorted(newest.items()):
            for check, result in content["results"].items():
                if not result["sound"]:
                    marked.add((len(rows), 4))
                verdict = "sound" if result["sound"] else "NOT SOUND"
                rows.append([str(run.path), f"{checkpoint}, {weights}", threat, check, verdict, result["found"]])
    columns = ["run", "weights", "threat", "check", "verdict", "what was found"]
    if not rows and not damaged:
        return None
    words, title = tuple(range(6)), "audits for masked gradients"
    return Table(title, columns, rows, damaged, words=words, marked=frozenset(marked))


def recipes(runs: Sequence[Run]) -> tuple[Table | None, Table]:
    """In what the recipes of the settings differ, and in what they do not."""
    columns = {
        label: _joined([_flat(recorded(run)) for run in group]) for label, group in by_setting(runs)
    }  # fmt: skip
    return _compared("recipes", "field", columns)


def environments(runs: Sequence[Run]) -> tuple[Table | None, Table]:
    """In what the environments differ, and in what they do not."""
    columns = {}
    for label, group in by_setting(runs):
        columns[label] = _joined([_flat(_surroundings(run)) for run in group])
    return _compared("environments", "what", columns)


def commands(run: Run) -> tuple[str, str | None]:
    """The command that repeats a run, and the one that began it, where that is known; both for a shell."""
    again = run.path.with_name(f"{run.path.resolve().name}-again")
    repeat = shlex.join(["at-smooth", "train", "--recipe", str(run.path / "recipe.yaml"), "--out", str(again)])
    command = run.environment.get("command")
    if not isinstance(command, list) or not command:
        return repeat, None
    program, *arguments = map(str, command)
    return repeat, shlex.join([Path(program).name, *arguments])


def teachers(runs: Sequence[Run]) -> Table | None:
    """The self-teachers of each run, by their best epoch on the validation set."""
    rows = []
    for run in runs:
        for teacher in teachers_of(run):
            recipe = recorded(teacher)
            own = recipe.get("attack") == recorded(run).get("attack")
            method = str(recipe["method"]) + ("" if own else f", {recipe.get('attack')}")
            best = teacher.summary["raw"]["best"] if teacher.finished else {}
            epoch = str(best.get("epoch", "-"))
            val_ra = best.get("val_ra")
            rows.append([str(run.path), teacher.path.name, method, epoch, "-" if val_ra is None else f"{val_ra:.2f}",
                         str(Progress.of(teacher))])  # fmt: skip
    columns = ["run", "teacher", "trained by", "best epoch", "validation RA", "state"]
    return Table("teachers", columns, rows, words=(0, 1, 2, 5)) if rows else None


def duration(seconds: float) -> str:
    """A length of time in the unit that reads best."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _noting(damaged: list[str]) -> Callable[[FileError], None]:
    """Notes what is left out below a table."""
    return lambda error: damaged.append(f"left out: {error}".removesuffix("."))


def _subject(content: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What an evaluation was of: checkpoint, weights, threat, images."""
    threat = str(Threat(**content["threat"]))
    return Path(content["checkpoint"]).stem, content["weights"], threat, f"{content['part']} of {content['dataset']}"


def _surroundings(run: Run) -> dict[str, Any]:
    """A run's environment, without what is said elsewhere; of the times it was resumed only their number."""
    facts = {name: value for name, value in run.environment.items() if name not in _ELSEWHERE}
    resumed = facts.pop("resumed", [])
    return {**facts, **({"resumed": f"{len(resumed)} times"} if resumed else {})}


def _flat(content: Mapping[str, Any]) -> dict[str, str]:
    """Every field in words; those of a mapping under its name."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat.update({f"{name.removesuffix('_options')}: {key}": _word(part) for key, part in value.items()})
        else:
            flat[name] = _word(value)
    return flat


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_word, value)) + "]"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _joined(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Fields of the runs of one setting; where they differ, all values."""
    names = _in_order(run for run in runs)
    return {name: ", ".join(dict.fromkeys(run.get(name, "-") for run in runs)) for name in names}


def _compared(title: str, what: str, columns: Mapping[str, Mapping[str, str]]) -> tuple[Table | None, Table]:
    """Fields that are not the same in all columns, those unlike the first marked; and fields that are."""
    differing: list[list[str]] = []
    common, marked = [], set()
    for name in _in_order(columns.values()):
        values = [column.get(name, "-") for column in columns.values()]
        if len(set(values)) == 1:
            common.append([name, values[0]])
            continue
        marked |= {(len(differing), number) for number, value in enumerate(values, start=1) if value != values[0]}
        differing.append([name, *values])
    words = tuple(range(len(columns) + 1))
    table = Table(f"differences of the {title}", [what, *columns], differing, words=words, marked=frozenset(marked))
    return table if differing else None, Table(f"what the {title} share", [what, "value"], common, words=(0, 1))


def _in_order(mappings: Iterable[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
