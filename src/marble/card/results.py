"""Of the model card: what was gained, in numbers and pictures."""

from __future__ import annotations

from pathlib import Path

from marble.card.markdown import plain, table
from marble.run import Run

SHOWN = 6
"""Most held-out prompts shown with pictures."""


def gains(run: Run) -> str:
    """Every reward before and after, with the interval of its gain."""
    evaluation = run.evaluation()
    if "gains" not in evaluation:
        return "Not measured: this run was broken off before its final evaluation."
    rows = [
        [
            plain(name),
            "trained on" if name in evaluation["training_rewards"] else "held out",
            f"{gain['before']:.4g}",
            f"{gain['after']:.4g}",
            f"{gain['gain']:+.3g}",
            f"{gain['low']:+.3g} … {gain['high']:+.3g}",
        ]
        for name, gain in evaluation["gains"].items()
    ]
    note = (
        f"{len(evaluation['before']['prompts'])} held-out prompts, {len(evaluation['seeds'])} images each, the same "
        f"seeds before and after, {evaluation['steps']} steps, {guidance(run.config.evaluation.guidance)}; intervals "
        "by bootstrap over prompts. Each reward is in its own units. “Held out” rewards were never trained on."
    )
    head = ("reward", "", "before", "after", "gain", "95% interval")
    return table(head, rows, "llrrrr") + f"\n\n{note}"


def guidance(scale: float) -> str:
    """A guidance scale in words."""
    return "no classifier-free guidance" if scale == 1 else f"guidance scale {scale:g}"


def card_images(run: Run) -> dict[str, Path]:
    """The pictures that the card shows: path in the repository → file of the run."""
    return {name: path for _, *pair in _pairs(run) for name, path in pair}


def pictures(run: Run) -> str:
    """The same prompts and seeds before and after, or nothing if the run has no pictures."""
    pairs = _pairs(run)
    if not pairs:
        return ""
    rows = [[plain(prompt), f"![before]({before[0]})", f"![after]({after[0]})"] for prompt, before, after in pairs]
    note = "The same seed before and after. Held-out prompts, taken evenly from the evaluation’s and not chosen by eye."
    return "## Before and after\n" + table(("prompt", "before", "after"), rows) + f"\n\n{note}"


def _pairs(run: Run) -> list[tuple[str, tuple[str, Path], tuple[str, Path]]]:
    """`(prompt, before, after)` for prompts evenly among those that have both pictures."""
    prompts = run.evaluation().get("before", {}).get("prompts", [])
    found = []
    for number, prompt in enumerate(prompts):
        files = [run.path / "samples" / side / f"{number:03d}_0.png" for side in ("before", "after")]
        if all(file.is_file() for file in files):
            before, after = [(f"images/{file.parent.name}_{number:03d}.png", file) for file in files]
            found.append((prompt, before, after))
    count = min(SHOWN, len(found))
    return [found[i * len(found) // count] for i in range(count)]
