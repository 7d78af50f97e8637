"""The conflict page's own figures, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from marble.conflict.directions import DIRECTIONS
from marble.report.figures import COLOURS, svg

_PAINT = dict(zip(DIRECTIONS, ("#d1495b", "#e09f3e", "#7d5ba6", "#2a9d6f"), strict=True))


def plain(name: str) -> str:
    """A name that matplotlib takes as it is: between two dollars it would read a formula."""
    return name.replace("$", r"\$")


def heatmaps(
    names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float | None]]], sure: Sequence[Sequence[bool]] = ()
) -> str:
    """`[K, K]` tables of numbers between −1 and 1 side by side; what is not known is grey.

    Args:
        names: K rewards.
        panels: tables by title.
        sure: of the last panel, entries to frame.
    """
    size, count = 0.62 * len(names) + 0.9, len(panels)
    figure, axes = plt.subplots(
        1, count, figsize=(size * count + 2.2, size + 0.6), squeeze=False, sharey=True, layout="constrained"
    )
    cmap = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#dcdce0")
    labels = [plain(name) for name in names]
    shown = None
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        values = np.array([[np.nan if v is None else v for v in row] for row in table], dtype=float)
        np.fill_diagonal(values, np.nan)
        shown = axis.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(values):
            text = "" if i == j else "?" if np.isnan(value) else f"{value:+.2f}"
            dark = not np.isnan(value) and abs(value) > 0.65
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "#222")
        axis.set_title(title)
        axis.set_xticks(range(len(names)), labels, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), labels)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    for i, row in enumerate(sure):
        for j, flag in enumerate(row):
            if flag and i != j:
                axes.flat[-1].add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec="#111", lw=1.8))
    if shown is not None:
        figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
    return svg(figure)


def sizes(scores: Mapping[str, Mapping[str, Any]], norms: Mapping[str, Mapping[str, Any]]) -> str:
    """Every reward's spread within prompts (the largest is 1), share of the raw sum's variance, and gradient's norm."""
    names = list(scores)[::-1]
    figure, axes = plt.subplots(
        1, 3, figsize=(9.6, 0.42 * len(names) + 1.0), sharey=True, width_ratios=(3, 3, 4), layout="constrained"
    )
    rows = np.arange(len(names))
    axes[0].barh(rows, [scores[name]["spread_relative"] for name in names], 0.6, color=COLOURS[0])
    axes[0].set_title("spread within prompts")
    axes[1].barh(rows, [scores[name]["owns"] for name in names], 0.6, color=COLOURS[1])
    axes[1].axvline(1 / len(names), color="#999", lw=0.8, ls=":")
    axes[1].axvline(0, color="#333", lw=0.8)
    axes[1].set_title("share of the raw sum")
    for y, name in enumerate(names):
        row = norms[name]
        axes[2].barh(y + 0.17, row["one_batch"] or 0, 0.3, color="#c9ccd6", label="in one update" if not y else None)
        axes[2].barh(y - 0.17, row["true"], 0.3, color=COLOURS[2], label="noise taken out, 95%" if not y else None)
        axes[2].plot([row["true_low"], row["true_high"]], [y - 0.17, y - 0.17], color="#1d4f39", lw=1.6)
    axes[2].set_title("norm of the gradient")
    axes[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[0].set_yticks(rows, [plain(name) for name in names])
    for axis in axes:
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    return svg(figure)


def worst(directions: Mapping[str, Mapping[str, Any]]) -> str:
    """Cosine of every direction with the reward that it serves worst: a dot an update, the mean, and the truth."""
    names = [name for name in DIRECTIONS if directions[name]["advantage"] is not None][::-1]
    figure, axis = plt.subplots(figsize=(9.2, 0.62 * len(names) + 0.9), layout="constrained")
    rng = np.random.default_rng(0)
    for y, name in enumerate(names):
        row, paint = directions[name], _PAINT[name]
        values = np.array([value for batch in row["advantage"]["worst_by_update"] for value in batch])
        axis.scatter(values, y + rng.uniform(-0.24, 0.24, len(values)), s=16, color=paint, alpha=0.35, lw=0)
        seen = row["advantage"]
        axis.plot([seen["worst_low"], seen["worst_high"]], [y, y], color=paint, lw=3)
        axis.plot([values.mean()], [y], "o", color=paint, mec="white", ms=8, label="mean of updates" if not y else None)
        true = row["true"]
        if true is not None:
            if true["worst_low"] is not None:
                axis.plot([true["worst_low"], true["worst_high"]], [y - 0.34, y - 0.34], color="#222", lw=1.2)
            label = "on the true gradients, 95%" if not y else None
            axis.plot([true["worst"]], [y - 0.34], "D", color="#222", ms=5, label=label)
    axis.axvline(0, color="#333", lw=1)
    axis.set_yticks(range(len(names)), [DIRECTIONS[name] for name in names])
    axis.set_ylim(-0.6, len(names) - 0.5)
    axis.set_xlabel("cosine with the reward that the direction serves worst; below 0 it makes that reward worse")
    axis.grid(axis="y", visible=False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)
