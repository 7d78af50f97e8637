"""Results by hand: two training rewards and a held-out one, on three prompts of which `b` judges the last two."""

from pathlib import Path

import numpy as np

from marble.compare.results import Result, Results

TRAINING, HELD_OUT = ["a", "b"], ["c"]
BASE, SPREAD = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])


def result(a, b, c, *, seconds=60.0, noise=0.0, curve=(), cosines=(), folder="run", updates=2, place=("cpu", 1)):
    """A run that gained so many spreads, every prompt alike, or `noise` more and less on the second and third."""
    gains = np.array([a, b, c], dtype=float)
    prompts = gains + noise * np.array([[0.0], [1.0], [-1.0]])
    prompts[0, 1] = np.nan
    return Result(
        folder=Path(folder),
        base=BASE,
        spread=SPREAD,
        means=BASE + gains * SPREAD,
        prompt_gains=prompts,
        seconds=seconds,
        memory=2**30,
        prompt_scores=BASE + prompts * SPREAD,
        images=6 * updates,
        updates=updates,
        place=place,
        cosines=list(cosines),
        curve=list(curve),
    )


def results(**arms):
    """Arm (underscores for hyphens) → seed → result, or the error of a failed cell."""
    named = {name.replace("_", "-"): seeds for name, seeds in arms.items()}
    done = {n: {s: r for s, r in seeds.items() if isinstance(r, Result)} for n, seeds in named.items()}
    cells = {
        name: {
            seed: {
                "status": "done" if isinstance(found, Result) else "failed",
                "folder": f"cells/{name}-{seed}",
                "error": None if isinstance(found, Result) else found,
            }
            for seed, found in seeds.items()
        }
        for name, seeds in named.items()
    }
    return Results(TRAINING, HELD_OUT, done, cells, {name: {"balance.method": name} for name in named})
