"""Prints the table of docs/rewards.md: every mini reward on perfect pictures, on worse ones, and on junk.

.venv/bin/python bench/mini_rewards.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from marble.mini.judges import junk_picture, spoil
from marble.mini.pairs import blur, noise
from marble.mini.prompts import to_record
from marble.mini.render import render
from marble.mini.rewards import (
    Aesthetic,
    Alignment,
    Composition,
    Diversity,
    Preference,
    SecondAlignment,
    TextRendering,
)
from marble.mini.world import MINI, Spec

PROMPTS, GROUP = 150, 6
REWARDS = [Aesthetic(), Alignment(), Preference(), TextRendering(), Composition(), Diversity(), SecondAlignment()]
Draw = Callable[[Spec, np.random.Generator], np.ndarray]
WAYS: dict[str, Draw] = {
    "perfect": lambda s, r: render(MINI, s, r),
    "timid layout": lambda s, r: render(MINI, s, r, variety=0.3),
    "blur, sigma 1": lambda s, r: blur(render(MINI, s, r), 1.0),
    "blur, sigma 2.5": lambda s, r: blur(render(MINI, s, r), 2.5),
    "noise, sigma 20": lambda s, r: noise(render(MINI, s, r), r, 20),
    "mildly spoiled": lambda s, r: spoil(render(MINI, s, r), r, heavy=False),
    "heavily spoiled": lambda s, r: spoil(render(MINI, s, r), r, heavy=True),
    "one thing wrong": lambda s, r: render(MINI, MINI.confuse(s, r), r),
    "two things wrong": lambda s, r: render(MINI, MINI.confuse(MINI.confuse(s, r), r), r),
    "junk": lambda s, r: junk_picture(MINI, r),
    "noise alone": lambda s, r: r.integers(0, 256, (64, 64, 3)).astype(np.uint8),
    "one picture six times": lambda s, r: render(MINI, s, np.random.default_rng(0)),
}


def main() -> None:
    """Print the table and the time per image."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pools = list(MINI.pools.values())
    specs = [pools[i % 5][rng.integers(len(pools[i % 5]))] for i in range(PROMPTS)]
    print("| pictures | " + " | ".join(r.name for r in REWARDS) + " |\n|---|" + "---|" * len(REWARDS))
    spent, judged = dict.fromkeys(range(len(REWARDS)), 0.0), dict.fromkeys(range(len(REWARDS)), 0)
    for name, draw in WAYS.items():
        marks: list[list[float]] = [[] for _ in REWARDS]
        for spec in specs:
            record = to_record(spec, "table")
            images = torch.from_numpy(np.stack([draw(spec, rng) for _ in range(GROUP)])).permute(0, 3, 1, 2)
            for k, reward in enumerate(REWARDS):
                if reward.applies(record):
                    start = time.perf_counter()
                    marks[k] += reward.score(images.contiguous(), [record] * GROUP).tolist()
                    spent[k] += time.perf_counter() - start
                    judged[k] += GROUP
        print(f"| {name} | " + " | ".join(f"{np.mean(m):.3f}" for m in marks) + " |")
    cells = [f"{1e3 * spent[k] / judged[k]:.2f}" for k in range(len(REWARDS))]
    print("| ms an image, six at a time, one thread | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
