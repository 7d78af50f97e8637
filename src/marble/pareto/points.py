"""The models that a front is drawn through: which weights at which strength each is made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from marble.errors import MarbleError
from marble.pareto.runs import Source
from marble.policy.mixing import Stored

KINDS = {
    "base": "the model before training",
    "method": "what a run exports",
    "checkpoint": "a run's average on the way",
    "scale": "a run's change of the model, weaker or stronger",
    "soup": "several runs' changes, mixed",
}
BASE = "base"
GRID = 3
"""Mixtures of each pair, if soups are named and their number is not."""


@dataclass(frozen=True)
class Point:
    """One model."""

    name: str  # unlike all others
    kind: str  # one of `KINDS`
    method: str  # whose it is: a run's or an arm's name, or the soup's ingredients; empty for the base
    parts: dict[Stored, float]  # weights that it is made of
    sources: tuple[Source, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """A name for files, unlike other points'."""
        readable = re.sub(r"[^\w.-]+", "-", self.name).strip("-.")[:60]
        return f"{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    @property
    def exported(self) -> Source | None:
        """The run that has evaluated this very model at its end."""
        return self.sources[0] if self.kind == "method" else None


def final_weights(source: Source) -> Stored:
    """What a run has exported."""
    folder = source.run.path
    if source.config.model.train == "lora":
        return Stored(folder / "lora")
    return Stored(folder / ("unet" if (folder / "unet").is_dir() else "transformer"))


def plan_points(
    sources: Sequence[Source],
    *,
    scales: Sequence[float] = (),
    checkpoints: bool = False,
    soups: int = 0,
    pairs: Sequence[tuple[str, str]] = (),
) -> list[Point]:
    """All points, the base first.

    Args:
        sources: runs.
        scales: strengths of each run's change; 0 and 1 are the base and the run themselves.
        checkpoints: whether those that were kept are points.
        soups: mixtures of each pair of specialists, at even distances; `GRID` of `pairs` if it is 0.
        pairs: labels of runs to mix, specialists or not.

    Raises:
        MarbleError: soups are asked for and no two runs are specialists of different rewards; a pair is one run twice;
            two points would be called the same.
    """
    taken = any(source.label == BASE for source in sources)
    points = [Point(f"{BASE} (before training)" if taken else BASE, "base", "", {})]
    for source in sources:
        points += _of_run(source, scales, checkpoints)
    chosen = [tuple(next(s for s in sources if s.label == label) for label in pair) for pair in pairs]
    if soups:
        groups = _specialists(sources)
        chosen += [pair for group in groups for pair in combinations(group, 2)]
        if not groups:
            raise MarbleError(
                "--soups: mixes specialists, runs trained on one reward each, of different rewards; none of these runs "
                f"can be paired ({_trained(sources)}); name runs to mix with --soup RUN RUN"
            )
        points += [_uniform(group) for group in groups if len(group) > 2]
    if alone := [one.label for one, other in chosen if one is other]:
        raise MarbleError(f'--soup: "{alone[0]}" with itself is no mixture; name two different runs')
    grid = soups or GRID
    unlike: dict[frozenset[Source], tuple[Source, ...]] = {}
    for pair in chosen:
        unlike.setdefault(frozenset(pair), pair)
    for one, other in unlike.values():
        points += [_soup({one: 1 - k / (grid + 1), other: k / (grid + 1)}) for k in range(1, grid + 1)]
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MarbleError(f'runs: two models would be called "{twice[0]}"; give one of the run folders another name')
    return points


def _of_run(source: Source, scales: Sequence[float], checkpoints: bool) -> list[Point]:
    final, own = final_weights(source), (source,)
    seed = {"seed": source.config.seed}
    points = [Point(source.label, "method", source.method, {final: 1.0}, own, seed)]
    for scale in dict.fromkeys(scales):
        if scale not in (0, 1):
            name = f"{source.label} × {scale:g}"
            points.append(Point(name, "scale", source.method, {final: scale}, own, seed | {"scale": scale}))
    for folder in source.run.checkpoints() if checkpoints else []:
        update = int(folder.name.removeprefix("step_"))
        if update < source.updates:  # the last one's average is what was exported
            stored = Stored.checkpoint(folder / "state.safetensors", source.config.model.lora)
            name = f"{source.label} after {update} updates"
            points.append(Point(name, "checkpoint", source.method, {stored: 1.0}, own, seed | {"update": update}))
    return points


def _soup(weights: dict[Source, float], name: str = "") -> Point:
    labels = {source.label: weight for source, weight in weights.items()}
    return Point(
        name or " + ".join(f"{weight:.3g} {label}" for label, weight in labels.items()),
        "soup",
        "soup of " + " and ".join(dict.fromkeys(source.method for source in weights)),
        {final_weights(source): weight for source, weight in weights.items()},
        tuple(weights),
        {"weights": labels},
    )


def _uniform(group: Sequence[Source]) -> Point:
    return _soup({source: 1 / len(group) for source in group}, f"mean of {', '.join(s.label for s in group)}")


def _specialists(sources: Sequence[Source]) -> list[list[Source]]:
    """Groups of runs of one training reward each, a reward once in a group; of several of a reward, those of a seed."""
    alone = [source for source in sources if len(source.trained) == 1]
    rewards = [source.trained[0] for source in alone]
    if len(set(rewards)) == len(rewards):
        groups = [alone]
    else:
        by_seed: dict[int, dict[str, Source]] = {}
        for source in alone:
            by_seed.setdefault(source.config.seed, {}).setdefault(source.trained[0], source)
        groups = [list(group.values()) for group in by_seed.values()]
    return [group for group in groups if len(group) > 1]


def _trained(sources: Sequence[Source]) -> str:
    return "; ".join(f"{source.label}: {', '.join(source.trained)}" for source in sources)
