"""Does training in bf16 end where training in float32 does? The embedded digits, several seeds, a Markdown table.

    python benchmarks/precision.py --seeds 5

Each run is the command ``at-smooth train`` in a process of its own; runs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
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
PRECISIONS = ("fp32", "bf16")
FIGURES = {
    "RA best": ("best", "test_ra"),
    "RA final": ("final", "test_ra"),
    "SA best": ("best", "test_sa"),
    "SA final": ("final", "test_sa"),
}


def folder(out: Path, setting: str, precision: str, seed: int) -> Path:
    return out / f"{'-'.join(SETTINGS[setting][1::2]) or 'baseline'}-{precision}-seed{seed}"


def train(out: Path, setting: str, precision: str, seed: int) -> None:
    path = folder(out, setting, precision, seed)
    if (path / "summary.json").is_file():
        return
    options = [*SETTINGS[setting], "--precision", precision, "--seed", str(seed), "--out", str(path)]
    command = [sys.executable, "-m", "at_smooth", "train", *options]
    if (path / "recipe.yaml").is_file():
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    print(f"{path.name}: done", file=sys.stderr, flush=True)


def figures(summary: dict[str, Any]) -> list[float]:
    block = summary[summary["reported"]]
    return [block[part][name] for part, name in FIGURES.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    arguments = parser.parse_args()

    seeds = range(arguments.seeds)
    wanted = [(setting, precision, seed) for seed in seeds for setting in SETTINGS for precision in PRECISIONS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda each: train(arguments.out, *each), wanted))

    print(f"| setting | precision | {' | '.join(FIGURES)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in FIGURES)} |")
    for setting in SETTINGS:
        columns = {}
        for precision in PRECISIONS:
            rows = [figures(Run(folder(arguments.out, setting, precision, seed)).summary) for seed in seeds]
            columns[precision] = list(zip(*rows, strict=True))
            cells = [f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}" for each in columns[precision]]
            print(f"| {setting} | {precision} | {' | '.join(cells)} |")
        pairs = zip(columns["fp32"], columns["bf16"], strict=True)
        verdicts = ["yes" if means_differ(list(one), list(other)) else "no" for one, other in pairs]
        print(f"| {setting} | do they differ? | {' | '.join(verdicts)} |")


if __name__ == "__main__":
    main()
