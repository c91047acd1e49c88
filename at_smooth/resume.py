"""Going on with a run: what may differ from when it was begun, and the state to go on from."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from at_smooth import checkpoint
from at_smooth.engine import Engine
from at_smooth.exceptions import CheckpointError, RunError
from at_smooth.recipe import HARMLESS, Recipe
from at_smooth.run import BEST, Run
from at_smooth.state import check
from at_smooth.versions import versions


def saved(run: Run) -> dict[str, Any]:
    """The content of ``last.pt``; empty where the run was stopped before anything was saved.

    Raises:
        CheckpointError: It cannot be read.
    """
    last = run.checkpoint("last")
    return checkpoint.load(last) if last.is_file() else {}


def refuse_another(run: Run, content: dict[str, Any], recipe: Recipe, fingerprint: str, override: bool) -> None:
    """Refuse to go on with a run as something that it is not.

    Args:
        run: The run.
        content: What is :func:`saved` of it.
        recipe: What is to be trained now.
        fingerprint: Of the data as they are now.
        override: Accept other versions, and fields of the recipe that change nothing about what is trained.

    Raises:
        RunError: Recipe, data or versions differ; the message names each difference.
        CheckpointError: The state is of another run.
    """
    if content:
        run.refuse_other(run.checkpoint("last"), content)
    changed = run.recipe.differences(recipe)
    other = [words for field, words in changed.items() if field not in HARMLESS]
    if other:
        raise RunError(f"{run.path} was begun with another recipe ({'; '.join(other)}). Start a new run with --out.")
    if content.get("fingerprint", fingerprint) != fingerprint:
        raise RunError(f"the data of {run.path} changed since it was begun. Start a new run with --out.")
    before, now = (content or run.environment).get("versions", {}), versions(recipe)
    differing = list(changed.values())
    before = before if isinstance(before, dict) else {}
    differing += [f"{name} was {before[name]}, is now {now[name]}" for name in before if now.get(name) != before[name]]
    if differing and not override:
        raise RunError(
            f"{run.path} was begun otherwise ({'; '.join(differing)}). If that is as you want it, add --override: the "
            f"run goes on, though not necessarily to the same bits."
        )


def restore(engine: Engine, run: Run, content: dict[str, Any]) -> None:
    """Bring an engine to where the run's last state left it.

    ``last.pt`` is written before the best weights, so those of its own epoch may not be in their files yet: then the
    state holds them. Several ranks do this together; the first reads.

    Raises:
        CheckpointError: A file does not fit, or the best weights are missing.
    """
    with checkpoint.fitting(run.checkpoint("last")):
        _check(engine, content["state"])
        engine.restore(content["state"], {})
        for weights, best in engine.best.items():
            if not best.row:
                continue
            model = engine.model if weights == "raw" else engine.smoother.smoothed()
            if engine.between_epochs and best.row["epoch"] == engine.epoch and model is not None:
                best.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            else:
                read = partial(_best_weights, run, weights, best.row["epoch"])
                best.weights = engine.runtime.ranks.by_first(read)


def _check(engine: Engine, state: dict[str, Any]) -> None:
    """Refuse a state whose parts do not belong together, before it is taken up."""
    check(state)
    history, underway, steps = state["history"], state["underway"], engine.schedule.steps_per_epoch
    batches = underway["batches"] if underway and underway["epoch"] == state["epoch"] else 0
    if [row["epoch"] for row in history] != list(range(1, len(history) + 1)):
        raise ValueError("its rows are not those of the epochs from 1 on")
    if state["epoch"] != len(history) and not (underway and state["epoch"] == len(history) + 1):
        raise ValueError(f"it has {len(history)} rows and is of epoch {state['epoch']}")
    if state["step"] != state["epoch"] * steps + batches:
        raise ValueError(f"step {state['step']} is not in epoch {state['epoch']}")
    checkpoint.refuse_other_kinds(engine.model.state_dict(), state["model"])
    checkpoint.refuse_other_kinds(engine.method.state(), state["method"])
    checkpoint.refuse_other_kinds(engine.smoother.state(), state["smoother"])
    _check_optimizer(engine, state)


def _check_optimizer(engine: Engine, state: dict[str, Any]) -> None:
    """Refuse what torch would take as it is, and trip over in the next step."""
    own, kept = engine.optimizer.state_dict(), state["optimizer"]
    rates = ("lr", "initial_lr")
    for mine, theirs in zip(own["param_groups"], kept["param_groups"], strict=True):
        other = [name for name in mine if name not in rates and mine[name] != theirs[name]]
        other += [name for name in rates if name in mine and not isinstance(theirs[name], int | float)]
        if other:
            raise ValueError(f"the optimizer's {', '.join(other)} is not the recipe's")
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for number, remembered in kept["state"].items():
        buffer = remembered["momentum_buffer"]
        if buffer is not None and buffer.shape != parameters[number].shape:
            raise ValueError(f"the momentum of parameter {number} is of another shape")
        checkpoint.refuse_other_kinds({"momentum_buffer": parameters[number]}, remembered)
    schedule, moving = state["lr"], ("last_epoch", "_step_count", "_last_lr")
    for name, value in engine.lr_schedule.state_dict().items():
        if name not in moving and schedule[name] != value:
            raise ValueError(f"the {name} of the learning rate's schedule is not the recipe's")
    if schedule["last_epoch"] != state["epoch"] or not isinstance(schedule["_step_count"], int):
        raise ValueError("the learning rate's schedule is of another epoch")


def _best_weights(run: Run, weights: str, epoch: Any) -> dict[str, Tensor]:
    path = run.checkpoint(BEST[weights])
    content = checkpoint.load(path)
    run.refuse_other(path, content)
    with checkpoint.fitting(path):
        if content["row"]["epoch"] != epoch:
            raise CheckpointError(
                f"{path} is of epoch {content['row']['epoch']}, and the run's best so far is epoch {epoch}. "
                f"Put the file back that belongs here, or start a new run with --out."
            )
        kept: dict[str, Tensor] = content[weights]
        return kept
