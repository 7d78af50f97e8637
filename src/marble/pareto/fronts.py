"""What the points say: fronts, what is dominated and how surely, hypervolumes over the base model.

Uncertainty is that of the prompts: for fronts and volumes they are drawn anew, the same for all points, and everything
is worked out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from marble.errors import MarbleError, nearest
from marble.evaluation import paired
from marble.pareto.measure import Measured
from marble.pareto.points import KINDS
from marble.statistics import FEWEST_PROMPTS, hypervolume, nondominated, prompt_interval, seed_interval, t_interval

DRAWS = 500
"""Times that the prompts are drawn anew."""
VOLUME_DRAWS = 200
"""Of these, those in which hypervolumes are worked out."""
DEFAULT = ("aesthetic", "alignment")


def choose_rewards(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The two or three rewards whose front is asked for; aesthetic and alignment, or the first two, if none is.

    Raises:
        MarbleError: one is not evaluated, or there are not two or three different ones.
    """
    for name in asked:
        if name not in names:
            raise MarbleError(
                f'--rewards: "{name}" is not evaluated in these runs.{nearest(name, names)} '
                f"Those are {', '.join(names)}"
            )
    if asked and not 2 <= len(set(asked)) == len(asked) <= 3:
        raise MarbleError(f"--rewards: two or three different ones make a front, got {', '.join(asked)}")
    if not asked and len(names) < 2:
        raise MarbleError(f"a front needs two rewards; these runs evaluate {', '.join(names)} alone")
    return list(asked or (DEFAULT if set(DEFAULT) <= set(names) else names[:2]))


def label_of(rewards: Sequence[str]) -> str:
    """How a set of rewards is called in `pareto.json`."""
    return " / ".join(rewards)


@dataclass(frozen=True)
class Cloud:
    """M points in K rewards, in spreads of the base model's scores above the base model."""

    measured: Sequence[Measured]  # the base first
    names: list[str]  # [K]
    spreads: np.ndarray  # [K] standard deviations of the base model's scores, 1 where they are all the same
    gains: np.ndarray  # [M, prompts, K] of a prompt's images, each paired with the base's; NaN without a pair
    at: np.ndarray  # [M, K] means of the gains, NaN where a reward gave no score
    drawn: np.ndarray  # [DRAWS, M, K], the same with prompts drawn anew

    @classmethod
    def of(cls, measured: Sequence[Measured], seed: int = 0) -> Cloud:
        """Of points with scores of the same prompts by the same rewards."""
        base = measured[0].evaluation
        spreads = np.nanstd(base.scores.numpy(), axis=0)
        spreads = np.where(spreads > 0, spreads, 1.0)
        gains = np.stack([_differences(measured[0], m) for m in measured]) / spreads
        prompts = gains.shape[1]
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)  # how often each prompt is drawn
        at, drawn = _means(np.ones((1, prompts)), gains)[0], _means(draws, gains)
        return cls(measured, base.names, spreads, gains, at, drawn)

    def chosen(self, method: str = "", kind: str = "", seed: int | None = None) -> list[int]:
        """The points of a kind or a method; of soups, what they are mixed of too."""
        points = [m.point for m in self.measured]
        found = [i for i, p in enumerate(points) if (not kind or p.kind == kind) and (not method or p.method == method)]
        if seed is not None:
            found = [i for i in found if seed in {source.config.seed for source in points[i].sources}]
        if method:
            mixed = {source for i in found if points[i].kind == "soup" for source in points[i].sources}
            found += [i for i, p in enumerate(points) if p.kind == "method" and mixed & {*p.sources} and i not in found]
        return sorted(found)


def _differences(one: Measured, other: Measured) -> np.ndarray:
    """`[prompts, K]`: by how much `other` scores higher, image by image; NaN where no image has both scores."""
    pairs = [paired(one.evaluation, other.evaluation, k) for k in range(len(one.evaluation.names))]
    return np.stack([(after - before).nanmean(dim=1).numpy() for before, after in pairs], axis=1)


def _means(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`[R, M, K]`: means over the prompts that were judged, `[M, prompts, K]`, weighted `[R, prompts]`."""
    judged = ~np.isnan(scores)
    total = np.tensordot(weights, np.where(judged, scores, 0.0), axes=(1, 1))
    count = np.tensordot(weights, judged.astype(float), axes=(1, 1))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def describe(measured: Sequence[Measured], rewards: Sequence[str]) -> dict[str, Any]:
    """The content of `pareto.json` but for what the command adds: points, and for every set of rewards its fronts.

    Args:
        measured: points, the base first.
        rewards: the two or three whose front was asked for; all other pairs follow.
    """
    cloud = Cloud.of(measured)
    sets = [tuple(rewards)]
    sets += [pair for pair in combinations(cloud.names, 2) if set(pair) != set(rewards)]
    described = [_point(m, cloud, i) for i, m in enumerate(measured)]
    content: dict[str, Any] = {}
    for chosen in sets:
        columns = [cloud.names.index(name) for name in chosen]
        standing = _standing(cloud, columns)
        for point in described:
            point["fronts"][label_of(chosen)] = standing.get(point["name"])
        content[label_of(chosen)] = {"rewards": list(chosen)} | _summary(cloud, columns, chosen == sets[0])
    trained = [name for name in cloud.names if any(name in s.trained for m in measured for s in m.point.sources)]
    return {
        "rewards": list(rewards),
        "names": cloud.names,
        "training_rewards": trained,
        "prompts": len(measured[0].evaluation.prompts),
        "images": len(measured[0].evaluation.scores) // len(measured[0].evaluation.prompts),
        "reference": measured[0].point.name,
        "spreads": dict(zip(cloud.names, cloud.spreads.tolist(), strict=True)),
        "points": described,
        "sets": content,
        "hypervolumes": {"rewards": trained, "values": _matrix(content, trained)},
    }


def _point(measured: Measured, cloud: Cloud, i: int) -> dict[str, Any]:
    point, table = measured.point, measured.evaluation.per_prompt
    return {
        "name": point.name,
        "kind": point.kind,
        "method": point.method,
        "sources": [str(source.run.path) for source in point.sources],
        "parameters": point.parameters,
        "taken": measured.taken,
        "file": point.file_name,
        "means": measured.evaluation.means(),
        "intervals": {name: _ends(column) for name, column in zip(cloud.names, table.T, strict=True)},
        "gains": {name: None if np.isnan(v) else float(v) for name, v in zip(cloud.names, cloud.at[i], strict=True)},
        "gain_intervals": {name: _ends(gains) for name, gains in zip(cloud.names, cloud.gains[i].T, strict=True)},
        "fronts": {},
    }


def _ends(values: np.ndarray) -> list[float] | None:
    ends = prompt_interval(values)
    return None if ends is None else list(ends)


def _standing(cloud: Cloud, columns: list[int]) -> dict[str, dict[str, Any]]:
    """By name, whether a point is on the front of these rewards, how surely, and what dominates it.

    `share`: of the draws in which it is on the front. A dominated point is told apart if some point that dominates it
    is better in some reward beyond the prompts' noise: the paired 95% interval, for all rewards of the set and all
    those points together, lies above 0. `dominated_by` is the surest of these points, or else of all that dominate it.
    """
    at, drawn = cloud.at[:, columns], cloud.drawn[:, :, columns]
    there = np.flatnonzero(~np.isnan(at).any(axis=1))
    at, drawn = at[there], drawn[:, there]
    drawn = drawn[~np.isnan(drawn).any(axis=(1, 2))]
    front = nondominated(at)
    shares = np.mean([nondominated(draw) for draw in drawn], axis=0) if len(drawn) else np.full(len(at), np.nan)
    found = {}
    names = [cloud.measured[int(m)].point.name for m in there]
    for i, name in enumerate(names):
        row: dict[str, Any] = {"front": bool(front[i]), "share": float(shares[i])}
        row |= {"dominated_by": None, "told_apart": None}
        if not front[i]:
            better = np.flatnonzero((at >= at[i]).all(axis=1) & (at > at[i]).any(axis=1))
            ahead = drawn[:, better] - drawn[:, [i]]  # [draws, better, D]
            clear = [_clear(cloud, int(there[i]), int(there[j]), columns, len(better)) for j in better]
            among = np.flatnonzero(clear) if any(clear) else np.arange(len(better))
            sure = (ahead >= 0).all(axis=2).sum(axis=0)
            row["dominated_by"] = names[better[among[int(sure[among].argmax())]]]
            row["told_apart"] = any(clear)
        found[name] = row
    return found


def _clear(cloud: Cloud, i: int, j: int, columns: Sequence[int], many: int) -> bool:
    """Whether point j is better than i in some reward beyond the noise, by Student's t, if `many` are asked about."""
    level = 1 - 0.05 / (many * len(columns))
    for difference in _differences(cloud.measured[i], cloud.measured[j])[:, columns].T:
        values = difference[~np.isnan(difference)]
        if len(values) >= FEWEST_PROMPTS and t_interval(values, level)[0] > 0:
            return True
    return False


def _summary(cloud: Cloud, columns: list[int], with_intervals: bool) -> dict[str, Any]:
    """Fronts by kind, and hypervolumes by kind and by method."""
    points = [m.point for m in cloud.measured]
    groups = {"all": [*range(len(points))]}
    groups |= {kind: found for kind in KINDS if kind != "base" and (found := cloud.chosen(kind=kind))}

    def volume(at: np.ndarray) -> float:
        return hypervolume(at[~np.isnan(at).any(axis=1)], np.zeros(len(columns)))

    def describe_group(group: list[int]) -> dict[str, Any]:
        at = cloud.at[group][:, columns]
        row: dict[str, Any] = {"hypervolume": volume(at), "points": len(group)}
        row["above_reference"] = int((at > 0).all(axis=1).sum())
        if with_intervals:
            drawn = [volume(draw[group][:, columns]) for draw in cloud.drawn[:VOLUME_DRAWS]]
            row["interval"] = np.percentile(drawn, [2.5, 97.5]).tolist()
        return row

    def front(group: list[int]) -> list[str]:
        there = [i for i in group if not np.isnan(cloud.at[i, columns]).any()]
        if not there:
            return []
        best = nondominated(cloud.at[there][:, columns])
        return [points[i].name for i, on in zip(there, best, strict=True) if on]

    methods = {}
    for method in dict.fromkeys(point.method for point in points[1:]):
        own = cloud.chosen(method)
        seeds = sorted({source.config.seed for i in own for source in points[i].sources})
        if len(seeds) < 2 or any(len({source.config.seed for source in points[i].sources}) > 1 for i in own):
            methods[method] = describe_group(own)
            continue
        volumes = [describe_group(cloud.chosen(method, seed=seed)) for seed in seeds]
        each = np.array([row["hypervolume"] for row in volumes])
        methods[method] = {
            "hypervolume": float(each.mean()),
            "points": sum(row["points"] for row in volumes),
            "above_reference": sum(row["above_reference"] for row in volumes),
            "seeds": dict(zip(map(str, seeds), each.tolist(), strict=True)),
            "interval": list(seed_interval(each) or ()),
        }
    return {
        "fronts": {kind: front(group) for kind, group in groups.items()},
        "kinds": {kind: describe_group(group) for kind, group in groups.items()},
        "methods": methods,
    }


def _matrix(sets: dict[str, Any], rewards: Sequence[str]) -> list[list[float | None]]:
    """Hypervolume of all points by pairs of `rewards`; None on the diagonal."""
    volumes = {frozenset(s["rewards"]): s["kinds"]["all"]["hypervolume"] for s in sets.values()}
    return [[volumes.get(frozenset((a, b))) if a != b else None for b in rewards] for a in rewards]
