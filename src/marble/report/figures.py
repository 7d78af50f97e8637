"""The report's figures, as SVG text. Every function takes plain data and draws one figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "marble",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "grid.color": "#e6e6ea",
        "legend.frameon": False,
    }
)

from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.figure import Figure  # noqa: E402

COLOURS = ["#3b6fb6", "#d1495b", "#2a9d6f", "#e09f3e", "#7d5ba6", "#4aa5b8", "#8a6d5b", "#c06c9b", "#5b7553", "#888888"]
HELD_OUT_COLOUR = "#777780"


def svg(figure: Figure) -> str:
    """A finished figure as SVG text, closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def colours(names: Sequence[str], held_out: Sequence[str]) -> dict[str, str]:
    """A colour for every reward; held-out ones share grey."""
    training = [name for name in names if name not in held_out]
    chosen = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(training)}
    return chosen | dict.fromkeys(held_out, HELD_OUT_COLOUR)


def curves(points: dict[str, list[tuple[int, float]]], paint: dict[str, str], held_out: Sequence[str]) -> str:
    """Held-out mean of every reward against updates, one small panel each."""
    columns = min(4, len(points))
    rows = -(-len(points) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns, 1.85 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(points) :]:
        axis.set_visible(False)
    for axis, (name, line) in zip(axes.flat, points.items(), strict=False):
        x, y = [u for u, _ in line], [v for _, v in line]
        axis.axhline(y[0], color="#999", lw=0.8, ls=":")
        axis.plot(x, y, color=paint[name], lw=1.8, marker="o", ms=3)
        axis.set_title(name + (" (held out)" if name in held_out else ""))
        axis.set_xlabel("update")
    return svg(figure)


def forest(gains: dict[str, dict[str, float]], paint: dict[str, str]) -> str:
    """Gain of every reward in spreads of the base model's scores, with its 95% interval."""
    names = list(gains)[::-1]
    figure, axis = plt.subplots(figsize=(6.4, 0.42 * len(names) + 0.8), layout="constrained")
    for y, name in enumerate(names):
        gain = gains[name]
        scale = gain["spread"] or 1.0
        low, mid, high = (gain[key] / scale for key in ("low", "gain", "high"))
        axis.plot([low, high], [y, y], color=paint[name], lw=5, alpha=0.35, solid_capstyle="round")
        axis.plot([mid], [y], "o", color=paint[name], ms=6)
    axis.axvline(0, color="#333", lw=0.9)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("gain on held-out prompts, in standard deviations of the base model's scores")
    return svg(figure)


def weights(updates: list[int], alpha: np.ndarray, names: Sequence[str], paint: dict[str, str]) -> str:
    """The balance over time: alpha `[updates, K]`."""
    figure, axis = plt.subplots(figsize=(6.4, 2.5), layout="constrained")
    for k, name in enumerate(names):
        axis.plot(updates, alpha[:, k], color=paint[name], lw=1.7, label=name)
    axis.axhline(1 / len(names), color="#999", lw=0.8, ls=":")
    axis.set_xlabel("update")
    axis.set_ylabel("alpha")
    axis.set_ylim(bottom=0)
    axis.legend(ncols=min(5, len(names)), loc="upper center", bbox_to_anchor=(0.5, 1.22), fontsize=8)
    return svg(figure)


LINES = {
    "weighted_sum": ("weighted sum of raw scores", "#d1495b"),
    "fresh": ("balanced, solved on this batch", "#2a9d6f"),
    "applied": ("applied", "#3b6fb6"),
}


def cosines(updates: list[int], rows: list[dict[str, Any]]) -> str:
    """Worst-reward cosine of three directions over time, without and with the advantage-free part of the loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.9), sharey=True, layout="constrained")
    titles = {"cosine_advantage": "advantage part of the gradients", "cosine": "whole gradients"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for key, (label, colour) in LINES.items():
            values = np.array([row[f"{kind}/{key}"] for row in rows])
            axis.plot(updates, values, color=colour, lw=0.7, alpha=0.4, marker=".", ms=4)
            axis.plot(updates, _running_mean(values), color=colour, lw=2, label=label)
        axis.axhline(0, color="#333", lw=0.9)
        axis.set_title(title)
        axis.set_xlabel("update")
    axes[0].set_ylabel("cosine with the worst-served reward")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def _running_mean(values: np.ndarray, width: int = 5) -> np.ndarray:
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def specialist_map(scores: np.ndarray, names: Sequence[str], sources: Sequence[str]) -> str:
    """z-scores of every sample by every reward, samples sorted by source: which rewards speak of which samples."""
    order = np.argsort(np.array(sources), kind="stable")
    spread = np.nanstd(scores, axis=0)
    z = (scores - np.nanmean(scores, axis=0)) / np.where(spread > 0, spread, 1.0)
    figure, axis = plt.subplots(figsize=(9.2, 0.32 * len(names) + 0.9), layout="constrained")
    picture = np.ma.masked_invalid(z[order].T)
    cmap = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#dcdce0")
    shown = axis.imshow(picture, aspect="auto", cmap=cmap, vmin=-2.5, vmax=2.5, interpolation="nearest")
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    ordered = [sources[i] for i in order]
    edges = [i for i in range(1, len(ordered)) if ordered[i] != ordered[i - 1]]
    for edge in edges:
        axis.axvline(edge - 0.5, color="#222", lw=1)
    bounds = [0, *edges, len(ordered)]
    axis.set_xticks([(a + b) / 2 for a, b in pairwise(bounds)], [ordered[a] for a in bounds[:-1]])
    axis.tick_params(length=0)
    figure.colorbar(shown, ax=axis, label="z", pad=0.01)
    return svg(figure)


def agreement(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Mean cosine between the rewards' own gradients."""
    size = 0.55 * len(names) + 1.2
    figure, axis = plt.subplots(figsize=(size + 0.7, size), layout="constrained")
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j:
                axis.text(j, i, f"{matrix[i, j]:+.2f}", ha="center", va="center", fontsize=7.5)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    figure.colorbar(shown, ax=axis, shrink=0.8)
    return svg(figure)
