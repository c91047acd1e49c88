"""Does training end in the same place in another arithmetic? The embedded digits, several seeds, a Markdown table.

    python benchmarks/precision.py --seeds 5
    python benchmarks/precision.py --against fp32+direct --seeds 3 --train "--model preact-resnet-18 -N width=96"

float32 as it is trained by default is held against bf16, or against float32 by torch's own layers. Each run is the
command ``at-smooth train`` in a process of its own; runs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from at_smooth import Run
from at_smooth.confidence import means_differ

SETTINGS = {
    "Baseline": [],
    "KD_std&adv + SWA": ["--regularizer", "kd-std-adv", "--smoother", "swa"],
}
ARITHMETICS = {
    "fp32": ["--precision", "fp32"],
    "fp32+direct": ["--precision", "fp32", "--set", "fast_layers=false"],
    "bf16": ["--precision", "bf16"],
}
FIGURES = {
    "RA best": ("best", "test_ra"),
    "RA final": ("final", "test_ra"),
    "SA best": ("best", "test_sa"),
    "SA final": ("final", "test_sa"),
}


def folder(out: Path, setting: str, arithmetic: str, seed: int) -> Path:
    return out / f"{'-'.join(SETTINGS[setting][1::2]) or 'baseline'}-{arithmetic}-seed{seed}"


def train(out: Path, more: list[str], setting: str, arithmetic: str, seed: int) -> None:
    path = folder(out, setting, arithmetic, seed)
    if (path / "summary.json").is_file():
        return
    options = [*SETTINGS[setting], *ARITHMETICS[arithmetic], *more, "--seed", str(seed), "--out", str(path)]
    command = [sys.executable, "-m", "at_smooth", "train", *options]
    if (path / "recipe.yaml").is_file():
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    print(f"{path.name}: done", file=sys.stderr, flush=True)


def figures(summary: dict[str, Any]) -> list[float]:
    block = summary[summary["reported"]]
    values = [block[part][name] for part, name in FIGURES.values()]
    if None in values:
        raise SystemExit("The runs hold no accuracy on the test set: leave test_every=0 out of --train.")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--against", choices=[name for name in ARITHMETICS if name != "fp32"], default="bf16")
    parser.add_argument("--setting", choices=list(SETTINGS), action="append", help="default: all")
    parser.add_argument("--train", type=shlex.split, default=[], help="more options of at-smooth train, in one string")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="one folder a table")
    arguments = parser.parse_args()

    seeds, settings = range(arguments.seeds), arguments.setting or list(SETTINGS)
    pair = ("fp32", arguments.against)
    wanted = [(setting, arithmetic, seed) for seed in seeds for setting in settings for arithmetic in pair]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda each: train(arguments.out, arguments.train, *each), wanted))

    print(f"| setting | arithmetic | {' | '.join(FIGURES)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in FIGURES)} |")
    for setting in settings:
        columns = {}
        for arithmetic in pair:
            rows = [figures(Run(folder(arguments.out, setting, arithmetic, seed)).summary) for seed in seeds]
            columns[arithmetic] = list(zip(*rows, strict=True))
            cells = [f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}" for each in columns[arithmetic]]
            print(f"| {setting} | {arithmetic} | {' | '.join(cells)} |")
        pairs = zip(*columns.values(), strict=True)
        verdicts = ["yes" if means_differ(list(one), list(other)) else "no" for one, other in pairs]
        print(f"| {setting} | do they differ? | {' | '.join(verdicts)} |")


if __name__ == "__main__":
    main()
