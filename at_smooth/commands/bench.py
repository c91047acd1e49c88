"""``at-smooth bench``: how fast training is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from at_smooth.commands.interruptible import interruptible
from at_smooth.commands.options import PATH, json_option, pairs_of

if TYPE_CHECKING:
    from at_smooth.bench.workload import Variant, Workload

_MODEL = "preact-resnet-18"  # the paper's
_LARGE = 1_000_000  # parameters, from which compiling is worth a try
_SMALL_RATE = 0.01  # made-up images must not make training diverge


@click.command()
@click.option("--model", help=f"Architecture. [default: {_MODEL}, or the data set's]")
@click.option("-N", "model_options", metavar="KEY=VALUE", multiple=True, help="Option of the model.")
@click.option("--dataset", help="Take model, batch size, attack, threads and image shape from this data set's recipe.")
@click.option("--data-dir", type=PATH, help="Where the data set's files are.")
@click.option("--image-size", type=click.IntRange(1), help="Pixels a side. [default: 32]")
@click.option("--channels", type=click.IntRange(1), help="Channels of the images. [default: 3]")
@click.option("--classes", type=click.IntRange(2), help="Classes. [default: 10]")
@click.option("--batch-size", type=click.IntRange(2), help="Images in a step. [default: 32]")
@click.option("--steps", type=click.IntRange(0), help="Steps of PGD. [default: 10]")
@click.option("--eps", help="Radius in Linf, in [0, 1] pixels. [default: 8/255]")
@click.option("--mode", type=click.Choice(["train", "eval"]), help="The model's mode while attacked. [default: train]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. [default: one a core]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    help="fp32 or bf16, with +compile or +direct (attacks by torch's own layers); several times for several. "
    "[default: fp32, on a CPU fp32+direct, bf16; fp32+compile and bf16+compile too for a large model]",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each contender.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown"]),
    default="text",
    show_default=True,
    help="How to print the table.",
)
@json_option
def bench(variants: tuple[str, ...], rounds: int, style: str, json_file: Path | None, **given: Any) -> None:
    """Time one step of adversarial training beside a plain torchattacks loop and the bare passes, on made-up images.

    Speedup is against the plain loop in float32; overhead is over the forward and backward passes that the algorithm
    needs, and below 0 where the engine has faster layers; the rate is what torch's convolutions reach alone. Wants a
    quiet machine.
    """
    from at_smooth.bench.rounds import measure
    from at_smooth.bench.workload import Variant
    from at_smooth.files import is_standard_output, refuse_taken_file
    from at_smooth.output import echo
    from at_smooth.results import write_json
    from at_smooth.terminal import Console

    refuse_taken_file(json_file)
    chosen = [Variant.parse(text) for text in variants]
    workload = _workload(given)
    progress = Console(stderr=True)

    def note(text: str) -> None:
        progress.print(text, soft_wrap=True)

    with interruptible(lambda: "nothing is kept of a benchmark"):
        measured = measure(workload, chosen or _usual(workload), rounds, note)
    table, beside = measured.table(), is_standard_output(json_file)
    if style == "text":
        console = Console(stderr=beside)
        console.print(table.rich())
        for line in measured.lines():
            console.print(line, soft_wrap=True)
    else:
        echo("\n".join([table.formatted(style), "", *(f"- {line}" for line in measured.lines())]), err=beside)
    if json_file:
        write_json(json_file, measured.to_dict())


def _workload(given: dict[str, Any]) -> Workload:
    from at_smooth.bench.workload import Workload
    from at_smooth.recipe import Recipe

    attack = {name: given[name] for name in ("steps", "mode") if given[name] is not None}
    named = ("dataset", "data_dir", "model", "batch_size", "eps", "threads", "device")
    fields = {name: given[name] for name in named if given[name] is not None}
    fields.update(attack_options=attack, lr=_SMALL_RATE, model_options=pairs_of(given["model_options"]))
    if given["dataset"] is None:
        usual = {"model": _MODEL, "batch_size": 32, "eps": "8/255", "threads": None}
        fields = {**usual, **fields, "attack_options": {"steps": 10, "mode": "train", **attack}}
    recipe = Recipe(**fields)
    shape, classes = _images_of(recipe) if given["dataset"] is not None else ((3, 32, 32), 10)
    size = given["image_size"]
    height, width = (size, size) if size else shape[1:]
    return Workload(recipe, (given["channels"] or shape[0], height, width), given["classes"] or classes)


def _images_of(recipe: Any) -> tuple[tuple[int, int, int], int]:
    """Shape and number of classes of a data set; read only where they are not known before."""
    published = recipe.plugin("dataset").published
    if published is not None:
        return published.shape, published.num_classes
    from at_smooth.experiment import prepare_data

    data = prepare_data(recipe)
    return data.shape, data.num_classes


def _usual(workload: Workload) -> list[Variant]:
    from at_smooth.bench.workload import Variant
    from at_smooth.runtime import usable_device

    parameters = sum(parameter.numel() for parameter in workload.network().parameters())
    on_cpu = usable_device(workload.recipe.device).type == "cpu"  # elsewhere torch's own layers are all there are
    usual = [Variant("fp32"), *[Variant("fp32", direct=True)] * on_cpu, Variant("bf16")]
    return usual + [Variant("fp32", compile=True), Variant("bf16", compile=True)] * (parameters >= _LARGE)
