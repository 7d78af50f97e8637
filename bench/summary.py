"""Prints runs side by side as Markdown: gains with intervals, and worst-reward cosines.

.venv/bin/python bench/summary.py runs/seed0 runs/seed1 …
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from marble import Run

DIRECTIONS = {"weighted_sum": "weighted sum", "fresh": "freshly solved", "applied": "applied"}


def main(paths: list[str]) -> None:
    """Print both tables."""
    runs = [Run(Path(path)) for path in paths]
    names = [path.name for path in (run.path for run in runs)]
    gains = [run.evaluation()["gains"] for run in runs]
    print("| reward | " + " | ".join(names) + " |\n|---|" + "---|" * len(runs))
    for reward in gains[0]:
        cells = [
            f"{g[reward]['before']:.4f} → {g[reward]['after']:.4f}, "
            f"{g[reward]['gain']:+.4f} [{g[reward]['low']:+.4f}, {g[reward]['high']:+.4f}]"
            for g in gains
        ]
        print(f"| {reward} | " + " | ".join(cells) + " |")
    minutes = [run.metrics()[-1]["time"]["elapsed"] / 60 for run in runs]
    print("| minutes of training | " + " | ".join(f"{m:.1f}" for m in minutes) + " |")
    print("\n| worst cosine | part | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(runs))
    for direction, title in DIRECTIONS.items():
        for kind, part in (("cosine_advantage", "advantage"), ("cosine", "whole")):
            cells = []
            for run in runs:
                values = np.array([r[f"{kind}/{direction}"] for r in run.metrics() if f"{kind}/{direction}" in r])
                first = values[: -(-len(values) // 2)]
                cells.append(
                    f"{values.mean():+.2f}; negative in {100 * (values < 0).mean():.0f}% of {len(values)}, "
                    f"first half {100 * (first < 0).mean():.0f}%"
                )
            print(f"| {title} | {part} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
