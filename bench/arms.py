"""Compares ways of balancing on the embedded model: arms × seeds under one budget, resumable cell by cell.

    .venv/bin/python bench/arms.py run OUT --seeds 0 1 [--arms NAME …] [--jobs 2] [--updates 90]
    .venv/bin/python bench/arms.py table OUT

Every cell is a run folder `OUT/ARM-SEED`, made by `marble demo` on one thread; a cell that has its evaluation is kept.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from marble import Run

SMOOTHING = {
    "weights10": {"refresh": 10, "smooth": "weights", "decay": 0.7},  # the paper's schedule
    "weights1": {"refresh": 1, "smooth": "weights", "decay": 0.9},
    "gram1": {"refresh": 1, "smooth": "gram", "decay": 0.9},
    "halves1": {"refresh": 1, "smooth": "gram", "decay": 0.9, "estimate": "halves"},
}
"""What is averaged, and how often the weights are solved for."""

ARMS: dict[str, dict[str, object]] = {
    f"{smoothing}/{strength}/{norms}": settings | {"advantage_scale": strength, "norms": norms}
    for (smoothing, settings), strength, norms in itertools.product(
        SMOOTHING.items(), ("published", "match"), ("raw", "folded")
    )
}
ARMS |= {
    f"{name}/match/folded/advantage": settings
    | {"advantage_scale": "match", "norms": "folded", "gradients": "advantage"}
    for name, settings in SMOOTHING.items()
}
ARMS |= {name: {"method": name} for name in ("published", "uniform", "weighted-sum", "gdpo", "reward-dropout")}
EXACT = ("closed-loop", "mgda", "upgrad", "dualproj", "cagrad", "nash-mtl", "pcgrad", "imtl-g", "aligned-mtl")
ARMS |= {name: {"method": name, "refresh": 1, "smooth": "gram", "decay": 0.9} for name in EXACT}


def cell(out: Path, arm: str, seed: int) -> Path:
    """The run folder of an arm and a seed."""
    return out / f"{arm.replace('/', '.')}-{seed}"


def run_cell(out: Path, arm: str, seed: int, updates: int) -> bool:
    """Run one cell unless it is done; returns whether it has its evaluation then."""
    folder = cell(out, arm, seed)
    if folder.exists() and Run(folder).evaluation().get("after"):
        return True
    if folder.exists():
        shutil.rmtree(folder)
    settings = [x for name, value in ARMS[arm].items() for x in (f"--balance.{name}", str(value))]
    command = [sys.executable, "-m", "marble", "demo", "--out", str(folder), "--seed", str(seed), "--threads", "1"]
    command += ["--budget.updates", str(updates), "--evaluation.every", "0", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(arm, seed, "done" if done.returncode == 0 else done.stderr[-2000:], flush=True)
    return done.returncode == 0


def table(out: Path) -> None:
    """Print every arm's gains in standard deviations of the base model's scores, seed by seed."""
    rows, names = [], []
    for arm in ARMS:
        found = []
        for folder in sorted(out.glob(f"{arm.replace('/', '.')}-*")):
            content = Run(folder).evaluation()
            if folder.name.rsplit("-", 1)[0] == arm.replace("/", ".") and content.get("after"):
                found.append([content["gains"][n]["gain"] / content["gains"][n]["spread"] for n in content["gains"]])
                names, trained = list(content["gains"]), len(content["training_rewards"])
        if found:
            gains = np.array(found)
            own = gains[:, :trained]
            rows.append((arm, own.mean(axis=1), own.min(axis=1), gains))
    print("| arm | mean | worst | " + " | ".join(names) + " |\n|---|---|---|" + "---|" * len(names))
    for arm, mean, worst, gains in sorted(rows, key=lambda row: -row[1][0]):
        cells = [" ".join(f"{value:.2f}" for value in column) for column in (mean, worst, *gains.T)]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=90)
    args = parser.parse_args()
    if args.what == "table":
        table(args.out)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        cells = itertools.product(args.seeds, args.arms)
        done = list(pool.map(lambda pair: run_cell(args.out, pair[1], pair[0], args.updates), cells))
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
