"""Train the paper's settings on the embedded digits over several seeds and write the tables of docs/results.md.

    python examples/digits_results.py --seeds 5 --jobs 2

Each run is the command ``at-smooth train`` in a process of its own; runs that are finished are not trained again, so
the script can be stopped and started. Everything else of the file stays as it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from at_smooth import Run, __version__
from at_smooth.report import comparison_rows, format_table

SETTINGS = {
    "Baseline": [],
    "Label smoothing": ["--regularizer", "label-smoothing"],
    "Tf-KD": ["--regularizer", "tf-kd"],
    "KD_std": ["--regularizer", "kd-std"],
    "KD_adv": ["--regularizer", "kd-adv"],
    "KD_std&adv": ["--regularizer", "kd-std-adv"],
    "SWA": ["--smoother", "swa"],
    "iSWA": ["--smoother", "iswa"],
    "KD_std&adv + SWA": ["--regularizer", "kd-std-adv", "--smoother", "swa"],
    "KD_std&adv + iSWA": ["--regularizer", "kd-std-adv", "--smoother", "iswa"],
}
TABLES = {"default": [], "true-labels": ["-D", "label_noise=0"]}


def folder(out: Path, setting: str, seed: int) -> Path:
    name = setting.lower().replace(" + ", "-").replace(" ", "-").replace("&", "-").replace("_", "-")
    return out / f"{name}-seed{seed}"


def train(path: Path, options: list[str], seed: int) -> None:
    if (path / "summary.json").is_file():
        return
    command = [sys.executable, "-m", "at_smooth", "train", *options, "--seed", str(seed), "--out", str(path)]
    if (path / "recipe.yaml").is_file():
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    print(f"{path.name}: done", flush=True)


def table(out: Path, seeds: int) -> list[str]:
    rows = comparison_rows([Run(folder(out, setting, seed)) for setting in SETTINGS for seed in range(seeds)])
    named = [(setting, cells) for setting, (_, cells) in zip(SETTINGS, rows, strict=True)]
    return format_table(named, "markdown").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/digits-results"))
    parser.add_argument("--write", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    arguments = parser.parse_args()

    seeds = range(arguments.seeds)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(train, folder(arguments.out / name, setting, seed), [*common, *options], seed)
            for name, common in TABLES.items()
            for seed in seeds
            for setting, options in SETTINGS.items()
        ]
        for job in jobs:
            job.result()

    text = arguments.write.read_text(encoding="utf-8")
    made = f"at-smooth {__version__}, {len(seeds)} seeds, {platform.system()} on {platform.machine()}, CPU"
    for name in TABLES:
        lines = table(arguments.out / name, len(seeds))
        print("\n".join([name, *lines]))
        begin, end = f"<!-- table {name} -->", f"<!-- end of table {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        body = [begin, f"{made}; mean ± standard deviation, percent:", "", *lines, "", end]
        text = head + "\n".join(body) + tail
    arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
