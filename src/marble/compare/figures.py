"""The comparison's figures, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt

from marble.report.figures import COLOURS, svg

_DASHES = ("-", "--", ":")
"""Ten arms share a line each; those beyond have the same colours again."""


def paint(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Arm → colour and line style."""
    return {name: (COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]) for i, name in enumerate(arms)}


def curves(lines: Mapping[str, Mapping[str, Any]], rewards: Sequence[str], held_out: Sequence[str]) -> str:
    """Held-out mean against updates, a panel a reward, a line an arm with its band over seeds.

    Args:
        lines: arm → reward → `updates`, `mean`, `low`, `high`.
        rewards: panels.
        held_out: those of them that nobody trained on.
    """
    colours, columns = paint([*lines]), min(3, len(rewards))
    rows = -(-len(rewards) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.2 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(rewards) :]:
        axis.set_visible(False)
    for axis, reward in zip(axes.flat, rewards, strict=False):
        for name, by_reward in lines.items():
            if (line := by_reward.get(reward)) is None:
                continue
            colour, dash = colours[name]
            axis.plot(line["updates"], line["mean"], color=colour, ls=dash, lw=1.7, marker="o", ms=2.5, label=name)
            if None not in line["low"]:
                axis.fill_between(line["updates"], line["low"], line["high"], color=colour, alpha=0.12, lw=0)
        axis.set_title(reward + (" (held out)" if reward in held_out else ""))
        axis.set_xlabel("update")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(labels)))
    return svg(figure)


def forest(gains: Mapping[str, Mapping[str, Mapping[str, Any]]], rewards: Sequence[str]) -> str:
    """Gain of every arm by reward, in spreads, with its interval over seeds, or over prompts where there is one seed.

    Args:
        gains: arm → reward → estimate; the mean gain and the worst under `mean` and `worst` stand with the rewards.
        rewards: groups of rows, from the top.
    """
    colours, each = paint([*gains]), len(gains) + 1
    figure, axis = plt.subplots(figsize=(7.6, 0.17 * each * len(rewards) + 0.9), layout="constrained")
    for group, reward in enumerate(rewards):
        for place, (name, by_reward) in enumerate(gains.items()):
            found = by_reward[reward]
            if found["mean"] is None:
                continue
            y, colour = -(group * each + place), colours[name][0]
            ends = (found["low"], found["high"]) if found["low"] is not None else found.get("prompts", (None, None))
            if None not in ends:
                axis.plot(ends, [y, y], color=colour, lw=3.5, alpha=0.35, solid_capstyle="round")
            axis.plot([found["mean"]], [y], "o", color=colour, ms=4.5, label=name if group == 0 else None)
    axis.axvline(0, color="#333", lw=0.9)
    axis.set_yticks([-(group * each + (len(gains) - 1) / 2) for group in range(len(rewards))], [*rewards])
    axis.grid(False, axis="y")
    axis.set_xlabel("gain on held-out prompts, in standard deviations of the base model's scores")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)
