"""Prints a comparison as Markdown: every arm's gains, best composite z first, and differences between arms.

    .venv/bin/python bench/gains.py runs/mini [--against marble] [--arms NAME …]

Takes the folder of `marble compare` or its `comparison.json`, of which `bench/results` keeps those of the
methods beside the main ones (docs/benchmarks.md). Gains are in standard deviations of the base model's
scores; 95% intervals over seeds, in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from marble.compare import load_comparison
from marble.statistics import seed_interval


def gains(arm: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    """Seed → gains `[K]` of one arm's finished runs."""
    done = {seed: run for seed, run in arm["seeds"].items() if run["status"] == "done"}
    return {seed: np.array([run["gains"][name] for name in names], dtype=float) for seed, run in done.items()}


def show(values: np.ndarray) -> str:
    """Mean over seeds and, if there are enough, its interval."""
    interval = seed_interval(values)
    return f"{values.mean():+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def differences(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Cells of two arms' mean and worst gains, ours less theirs, paired by the seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys(), key=int)
    if not seeds:
        return "no seed in common | |"
    ours_, theirs_ = (np.stack([arm[seed] for seed in seeds]) for arm in (ours, theirs))
    return f"{show(ours_.mean(1) - theirs_.mean(1))} | {show(ours_.min(1) - theirs_.min(1))} |"


def main() -> None:
    """Print the table, and the one of differences if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--against", metavar="ARM", help="the arm that the others' gains are taken from, by seed")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these")
    args = parser.parse_args()
    content = load_comparison(args.comparison)
    training, held_out = content["training_rewards"], content["held_out_rewards"]
    arms = {name: arm for name, arm in content["arms"].items() if gains(arm, training)}
    if unknown := {*(args.arms or []), *([args.against] if args.against else [])} - arms.keys():
        parser.error(f"no finished run of {', '.join(sorted(unknown))}; there are {', '.join(arms)}")
    shown = sorted(args.arms or arms, key=lambda name: -(arms[name]["summary"]["composite_z"] or 0))
    print("| arm | seeds | mean | worst | z | " + " | ".join([*training, *held_out]) + " | cosine; negative |")
    print("|---|" + "---|" * (5 + len(training) + len(held_out)))
    for name in shown:
        rows = np.stack([*gains(arms[name], training).values()])
        every = np.stack([*gains(arms[name], [*training, *held_out]).values()]).mean(axis=0)
        summary, cells = arms[name]["summary"], " | ".join(f"{value:+.2f}" for value in every)
        z, cosine = summary["composite_z"], summary["cosine"]
        worst = f"{cosine['mean']:+.2f}; {cosine['negative']:.0%}" if cosine else ""
        print(f"| {name} | {len(rows)} | {show(rows.mean(1))} | {show(rows.min(1))} | {z:+.2f} | {cells} | {worst} |")
    if args.against:
        print(f"\n| less {args.against} | mean | worst |\n|---|---|---|")
        base = gains(arms[args.against], training)
        for name in shown:
            if name != args.against:
                print(f"| {name} | {differences(gains(arms[name], training), base)}")


if __name__ == "__main__":
    main()
