"""When does balancing beat a sum? Maps regimes of the embedded model: arms × seeds in every cell, and what wins there.

    .venv/bin/python bench/regimes.py run OUT [--cells NAME …] [--seeds 100 101] [--jobs 2]
    .venv/bin/python bench/regimes.py table OUT
    .venv/bin/python bench/regimes.py write OUT          # into src/marble/conflict/regimes.json

Every cell is a comparison folder `OUT/CELL` (`marble compare`) beside what `marble conflict` says of it; both are kept
when they are done. The three dials are how much the rewards' native scales differ, which share of the prompts each of
the two specialists judges, and how far one reward asks for the opposite of another.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from marble import Record, Reward
from marble.compare import load_comparison
from marble.config import demo_config_path, read_config
from marble.conflict.regimes import FILE, SCHEMA, axes_of
from marble.mini.rewards import Aesthetic, Preference
from marble.statistics import seed_interval

_VISITS = "balance.visits=importance"
DEFAULT = "marble"
ARMS = (
    DEFAULT,
    "raw-norms=marble:balance.norms=raw",
    f"weighted-sum=weighted-sum:{_VISITS}",
    f"standardised-sum=standardised-sum:{_VISITS}",
    f"upgrad=upgrad:balance.refresh=1,balance.smooth=gram,balance.decay=0.9,{_VISITS}",
)
"""The default, its weights on raw norms, the two sums and a solver that is not min-norm: at the same strength, with the
same visits."""
EVEN = 0.9  # full marks of the general rewards at which they spread within prompts as far as the specialists


class Contrary(Reward):
    """Preference, less and less of it, and more and more of the opposite of the aesthetic."""

    name = "contrary"
    about = "(1 − dial) · preference − dial · aesthetic, never negative"

    def __init__(self, *, dial: float = 0.0, marks: float = EVEN) -> None:
        """From preference alone (0) to the aesthetic's opposite (1)."""
        self.dial, self.marks = dial, marks
        self.revision = f"{Preference().revision}, dial {dial}"
        self._parts = Preference(marks=marks), Aesthetic(marks=marks)

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in 0 to 1.25 `marks`."""
        preference, aesthetic = (part.score(images, records) for part in self._parts)
        return (1 - self.dial) * preference + self.dial * (self.marks - aesthetic)


@dataclass(frozen=True)
class Cell:
    """One regime."""

    mismatch: int  # 1: the general rewards spread as far as the specialists; 10, 100: that much less
    share: float  # of the prompts that each specialist judges
    dial: float = 0.0

    @property
    def name(self) -> str:
        """The folder's."""
        return f"scale{self.mismatch}-share{round(100 * self.share)}-dial{self.dial:g}"

    def config(self, updates: int) -> dict[str, Any]:
        """The demo's configuration turned into this regime; 20 prompts an epoch, so that 5% of them are one."""
        values, marks = read_config(demo_config_path()), EVEN / self.mismatch
        rest = 1 - 2 * self.share
        shares = {"mini-places": rest, "mini-words": self.share, "mini-objects": self.share}
        values["prompts"] = [{"source": name, "share": share} for name, share in shares.items() if share > 0]
        general: list[dict[str, Any]] = [
            {"reward": "mini-aesthetic", "settings": {"marks": marks}},
            {"reward": "mini-alignment", "settings": {"marks": marks}},
            {"reward": "bench.regimes:Contrary", "settings": {"marks": marks, "dial": self.dial}},
        ]
        values["rewards"] = [*general, {"reward": "mini-text"}, {"reward": "mini-composition"}]
        values["rollout"] |= {"prompts": 20, "group_size": 7, "batch": 140}
        values["evaluation"] |= {"prompts": 54, "images": 6, "every": 0, "mixture": "even"}
        values["budget"] = {"updates": updates}
        return values


CELLS = [Cell(mismatch, share) for mismatch in (1, 10, 100) for share in (0.5, 0.2, 0.05)]
CELLS += [Cell(3, 0.2), *(Cell(10, 0.2, dial) for dial in (0.25, 0.5, 0.8))]  # finer where it turns


def run_cell(out: Path, cell: Cell, args: argparse.Namespace) -> bool:
    """Measure the conflict and compare the arms, as far as neither is done; returns whether both are then."""
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "regime.yaml"
    config.write_text(yaml.safe_dump(cell.config(args.updates), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "marble"]
    calls = []
    if not (folder / "conflict" / "conflict.json").exists():
        calls.append(["conflict", "mini", "--config", str(config), "--out", str(folder / "conflict")])
    seeds = [str(seed) for seed in args.seeds]
    jobs = ["--jobs", str(args.jobs), "--threads", "1"]
    calls.append(["compare", str(config), "--methods", *ARMS, "--seeds", *seeds, *jobs, "--out", str(folder / "arms")])
    for call in calls:
        done = subprocess.run([*command, *call], capture_output=True, text=True)
        print(cell.name, call[0], "done" if done.returncode == 0 else done.stderr[-2000:], flush=True)
        if done.returncode:
            return False
    return True


def gains(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arm → gains `[seeds, K]` of the training rewards, in standard deviations of the base model's scores.

    Only seeds that every arm has finished, so that arms can be paired; no arms at all if there are none.

    Args:
        content: of comparison.json.
    """
    arms, names = content["arms"], content["training_rewards"]
    finished = [{seed for seed, run in arm["seeds"].items() if run["status"] == "done"} for arm in arms.values()]
    seeds = sorted(set.intersection(*finished), key=int) if finished else []
    return {
        arm: np.array([[row["seeds"][seed]["gains"][name] for name in names] for seed in seeds], dtype=float)
        for arm, row in arms.items()
        if seeds
    }


def winner(values: dict[str, np.ndarray]) -> str:
    """The arm with the largest mean over seeds."""
    return max(values, key=lambda arm: values[arm].mean())


def suggested(mean: dict[str, np.ndarray], worst: dict[str, np.ndarray]) -> str:
    """Of the arms that lead the default on average and at worst on every seed, the one that leads it most, or it."""
    leads = {arm: np.stack([mean[arm] - mean[DEFAULT], worst[arm] - worst[DEFAULT]]) for arm in mean if arm != DEFAULT}
    return max((arm for arm in leads if (leads[arm] > 0).all()), key=lambda arm: leads[arm].mean(), default=DEFAULT)


def settings(content: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """What an arm laid over the config's `balance`, as the map wants it."""
    prefix = "balance."
    overrides = content["arms"][arm]["overrides"]
    assert all(setting.startswith(prefix) for setting in overrides), overrides
    return {setting.removeprefix(prefix): value for setting, value in overrides.items()}


def measured(out: Path) -> Iterator[tuple[Cell, dict[str, Any], dict[str, np.ndarray]]]:
    """The cells in which all of `ARMS` have finished a seed: with their comparison, and its `gains`."""
    for cell in CELLS:
        if (out / cell.name / "arms" / "comparison.json").exists():
            content = load_comparison(out / cell.name / "arms")
            found = gains(content)
            if found.keys() >= {arm.partition("=")[0] for arm in ARMS}:
                yield cell, content, found


def table(out: Path) -> None:
    """Print every measured cell: gains of the arms, mean and worst, seed by seed."""
    print("| scale | share | dial | conflict | " + " | ".join(arm.partition("=")[0] for arm in ARMS) + " |")
    print("|---|---|---|---|" + "---|" * len(ARMS))
    for cell, _, found in measured(out):
        arms = [found[arm.partition("=")[0]] for arm in ARMS]
        cells = [
            " ".join(f"{v:.2f}" for v in rows.mean(axis=1)) + " / " + " ".join(f"{v:.2f}" for v in rows.min(axis=1))
            for rows in arms
        ]
        cosine = features(out, cell)["conflict"]
        known = "?" if cosine is None else f"{cosine:+.2f}"
        print(f"| {cell.mismatch}× | {cell.share:.0%} | {cell.dial:g} | {known} | " + " | ".join(cells) + " |")
    print_leads([(cell, found) for cell, _, found in measured(out)])


def print_leads(cells: Sequence[tuple[Cell, dict[str, np.ndarray]]]) -> None:
    """Print what the default gains more than every other arm, by kind of cell: 95% intervals over cells."""
    kinds = {
        "no conflict built in, 1×": lambda cell: not cell.dial and cell.mismatch == 1,
        "no conflict built in, 10× and 100×": lambda cell: not cell.dial and cell.mismatch >= 10,
        "no conflict built in, all": lambda cell: not cell.dial,
        "a dial of conflict": lambda cell: cell.dial > 0,
    }
    others = [name for name in (arm.partition("=")[0] for arm in ARMS) if name != DEFAULT]
    print(f"\n| {DEFAULT} less …, mean / worst | cells | " + " | ".join(others) + " |")
    print("|---|---|" + "---|" * len(others))
    for kind, belongs in kinds.items():
        rows = [found for cell, found in cells if belongs(cell)]
        if not rows:
            continue
        texts = []
        for other in others:
            leads = [[of(row[DEFAULT]) - of(row[other]) for row in rows] for of in (_mean, _worst)]
            texts.append(" / ".join(_with_interval(np.array(values)) for values in leads))
        print(f"| {kind} | {len(rows)} | " + " | ".join(texts) + " |")


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def _worst(rows: np.ndarray) -> float:
    return float(rows.min(axis=1).mean())


def _with_interval(values: np.ndarray) -> str:
    interval = seed_interval(values)
    return f"{values.mean():+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def features(out: Path, cell: Cell) -> dict[str, float | None]:
    """What `marble conflict` measured of a cell, as the map's axes."""
    content = json.loads((out / cell.name / "conflict" / "conflict.json").read_text(encoding="utf-8"))
    return axes_of(content)


def write(out: Path, file: Path = FILE) -> None:
    """Write the packaged map of all measured cells; one whose place on it is not known is left out, and named."""
    cells = []
    for cell, content, found in measured(out):
        place = features(out, cell)
        unknown = [axis for axis, value in place.items() if value is None]
        if unknown:
            print(f"{cell.name} left out: its {', '.join(unknown)} is not known")
            continue
        mean = {arm: rows.mean(axis=1) for arm, rows in found.items()}
        worst = {arm: rows.min(axis=1) for arm, rows in found.items()}
        best = {"mean": winner(mean), "worst": winner(worst), "suggested": suggested(mean, worst)}
        named = {what: settings(content, arm) for what, arm in best.items()}
        cells.append(place | named | {"seeds": len(mean[DEFAULT])})
    about = "bench/regimes.py on world mini 1, tuning seeds; see docs/benchmarks.md"
    file.write_text(json.dumps({"schema": SCHEMA, "about": about, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "write"])
    parser.add_argument("out", type=Path)
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="CELL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=90)
    args = parser.parse_args()
    if args.what == "run":
        done = [run_cell(args.out, cell, args) for cell in CELLS if cell.name in args.cells]
        sys.exit(0 if all(done) else 1)
    (table if args.what == "table" else write)(args.out)


if __name__ == "__main__":
    main()
