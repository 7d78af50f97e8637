"""What a finished run says for a comparison, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marble.compare.folder import Cell, Comparison
from marble.compare.sameness import different, measured, refuse
from marble.evaluation import Evaluation, paired
from marble.run import Run


@dataclass(frozen=True)
class Result:
    """One finished run. K rewards in the comparison's order, P held-out prompts; gains in spreads of the base model.

    A spread is the population standard deviation of the base model's scores by that reward.
    """

    folder: Path
    base: np.ndarray  # [K] mean scores of the base model
    spread: np.ndarray  # [K]
    means: np.ndarray  # [K] mean scores after training; NaN where there are none
    prompt_gains: np.ndarray  # [P, K], NaN where a reward does not judge a prompt
    prompt_scores: np.ndarray  # [P, K] after training, NaN likewise
    seconds: float | None  # of training, evaluations on the way included
    memory: int | None  # bytes at the peak: tensors on a GPU, or the whole process on the CPU
    images: int
    updates: int
    cosines: list[float] = field(default_factory=list)  # of the applied direction with the worst-served reward
    curve: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)  # (update, held-out means)
    place: tuple[Any, ...] = ()  # device, threads and jobs, where they are known: seconds compare only if these agree

    @property
    def gains(self) -> np.ndarray:
        """`[K]`: mean over the prompts that a reward judges; NaN if there are none."""
        return mean_over(self.prompt_gains)


@dataclass(frozen=True)
class Results:
    """All that is known of a comparison's cells."""

    training: list[str]
    held_out: list[str]
    done: dict[str, dict[int, Result]]  # arm → seed →
    cells: dict[str, dict[int, dict[str, Any]]]  # arm → seed → status, folder and error
    overrides: dict[str, dict[str, Any]]  # arm → its settings

    @property
    def rewards(self) -> list[str]:
        """All K rewards, those trained on first."""
        return [*self.training, *self.held_out]

    @property
    def first(self) -> Result | None:
        """Any finished run; the base model is the same in all."""
        return next((result for seeds in self.done.values() for result in seeds.values()), None)


def mean_over(rows: np.ndarray) -> np.ndarray:
    """`[…, K]` means over the second last axis of `[…, P, K]`, NaN left out; NaN where nothing is left."""
    there = ~np.isnan(rows)
    counts = there.sum(axis=-2)
    sums = np.where(there, rows, 0.0).sum(axis=-2)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def read_result(folder: Path, rewards: Sequence[str], record: Mapping[str, Any] | None = None) -> Result:
    """Read a finished run.

    Args:
        folder: of the run.
        rewards: K names, in the order wanted.
        record: what is known of its processes: `memory` in bytes, for runs on the CPU, `jobs` and `threads`.
    """
    run, record = Run(folder), record or {}
    evaluation, rows = run.evaluation(), run.metrics()
    before, after = (Evaluation.from_json(evaluation[part]) for part in ("before", "after"))
    columns = [before.names.index(name) for name in rewards]
    spread = np.nanstd(before.scores[:, columns].numpy(), axis=0)
    pairs = [paired(before, after, k) for k in columns]
    first, second = (
        torch.stack([side.nanmean(dim=1) for side in both], dim=1).numpy() for both in zip(*pairs, strict=True)
    )
    updates = [row for row in rows if row["update"]]
    last: Mapping[str, Any] = updates[-1] if updates else {}
    memory = [row["memory"] for row in updates if "memory" in row]
    return Result(
        folder=folder,
        base=_means(evaluation["before"], rewards),
        spread=spread,
        means=_means(evaluation["after"], rewards),
        prompt_gains=(second - first) / np.where(spread > 0, spread, 1.0),
        prompt_scores=second,
        seconds=last.get("time", {}).get("elapsed"),
        memory=max(memory) if memory else record.get("memory"),
        images=last.get("images", 0),
        updates=last.get("update", 0),
        cosines=[row["cosine_advantage/applied"] for row in updates if "cosine_advantage/applied" in row],
        curve=[(row["update"], row["held_out"]) for row in rows if "held_out" in row],
        place=_place(folder, record, on_gpu=bool(memory)),
    )


def _place(folder: Path, record: Mapping[str, Any], *, on_gpu: bool) -> tuple[Any, ...]:
    path = folder / "environment.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    threads = record.get("threads") or [found.get("threads")]
    return found.get("device") if on_gpu else "cpu", found.get("processes"), *threads, "jobs", *record.get("jobs", [])


def _means(content: Mapping[str, Any], rewards: Sequence[str]) -> np.ndarray:
    return np.array([np.nan if content["means"][name] is None else content["means"][name] for name in rewards])


def gather(comparison: Comparison) -> Results:
    """Read all cells of a comparison.

    Raises:
        MarbleError: two were not measured alike: a reward has another revision since, say.
    """
    done: dict[str, dict[int, Result]] = {name: {} for name in comparison.arms}
    cells: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in comparison.arms}
    rewards, first = [*comparison.training, *comparison.held_out], None
    for cell in comparison.cells():
        strayed = cell.strayed()
        status = "failed" if strayed else _status(cell)
        cells[cell.arm.name][cell.seed] = {
            "status": status,
            "folder": cell.folder.relative_to(comparison.path).as_posix(),
            "error": strayed or cell.record.get("error") if status == "failed" else None,
        }
        if status == "done":
            found = json.loads((cell.folder / "evaluation.json").read_text(encoding="utf-8"))
            first = first or (cell.folder, measured(found))
            check_measured(first, (cell.folder, measured(found)))
            done[cell.arm.name][cell.seed] = read_result(cell.folder, rewards, cell.record)
    overrides = {name: arm.overrides for name, arm in comparison.arms.items()}
    return Results(comparison.training, comparison.held_out, done, cells, overrides)


def check_measured(ours: tuple[Path, dict[str, Any]], theirs: tuple[Path, dict[str, Any]]) -> None:
    """Check that two runs were judged alike; folder and `measured` of each.

    Raises:
        MarbleError: names what differs.
    """
    found = different(ours[1], theirs[1])
    refuse(found, str(ours[0]), str(theirs[0]), "runs that were not evaluated alike cannot be compared")


def _status(cell: Cell) -> str:
    if cell.done:
        return "done"
    return "failed" if cell.record.get("error") else "unfinished"
