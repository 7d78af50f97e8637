"""One verdict in words, and how sure it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from marble.compare.results import Results
from marble.compare.table import composites, composites_by_seed, over_prompts, prompt_interval, relative, worst_reward
from marble.statistics import seed_interval

RIVALS = ("ppo", "weighted-sum", "standardised-sum")
"""Arms that a verdict is given against, where they are in the comparison."""
FAVOURITE = "marble"
"""The arm that it is given about, if it is in the comparison."""


@dataclass(frozen=True)
class Contrast:
    """What one arm has more than another."""

    mean: float
    low: float | None  # of the 95% interval; None if there is none
    high: float | None

    @property
    def sure(self) -> int:
        """1 if the interval lies above 0, −1 if below, 0 if it says neither or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def tell(self, unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
        """`+0.21 [+0.12, +0.30]`."""
        text = f"{_signed(self.mean * scale, digits)}{unit}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{_signed(self.low * scale, digits)}, {_signed(self.high * scale, digits)}]"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def contrast(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Contrast:
    """The difference of two arms' values by seed.

    Paired where at least two seeds are common, and then over those alone; else of the means, by Welch's t if both have
    two seeds and they are not all alike.
    """
    common = [seed for seed in ours if seed in theirs]
    if len(common) > 1:
        each = np.array([ours[seed] - theirs[seed] for seed in common])
        low, high = seed_interval(each) or (None, None)
        return Contrast(float(each.mean()), low, high)
    if len(common) == 1 and len(ours) == len(theirs) == 1:
        return Contrast(ours[common[0]] - theirs[common[0]], None, None)
    a, b = np.array([*ours.values()]), np.array([*theirs.values()])
    if len(a) < 2 or len(b) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return Contrast(float(a.mean() - b.mean()), None, None)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    return Contrast(float(a.mean() - b.mean()), float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Duel:
    """Two arms, training reward by training reward, in spreads of the base model's scores."""

    seeds: int  # over which intervals are; 1: over prompts
    common: int  # seeds that both have; from two on they are paired
    rewards: dict[str, Contrast]
    mean: Contrast
    worst: Contrast
    weakest: tuple[str | None, str | None]  # reward with the smallest gain, of each


def duel(results: Results, name: str, rival: str) -> Duel:
    """What `name` gains more than `rival`; both have finished runs."""
    ours, theirs = results.done[name], results.done[rival]
    common, trained = [seed for seed in ours if seed in theirs], len(results.training)
    seeds = len(common) if len(common) > 1 else min(len(ours), len(theirs))

    def between(columns: Sequence[int], worst: bool = False) -> Contrast:
        reduce = np.min if worst else np.mean
        values = [{s: float(reduce(run.gains[list(columns)])) for s, run in arm.items()} for arm in (ours, theirs)]
        found = contrast(*values)
        if found.low is not None or not common:
            return found
        one = common[0]
        drawn = [over_prompts(arm[one].prompt_gains, columns, worst=worst) for arm in (ours, theirs)]
        return Contrast(values[0][one] - values[1][one], *prompt_interval(drawn[0] - drawn[1]))

    own = range(trained)
    return Duel(
        seeds=seeds,
        common=len(common),
        rewards={name: between([k]) for k, name in enumerate(results.training)},
        mean=between(own),
        worst=between(own, worst=True),
        weakest=(worst_reward(results, [*ours.values()]), worst_reward(results, [*theirs.values()])),
    )


def verdict(results: Results, table: Mapping[str, Mapping[str, Any]], baseline: str | None) -> str:
    """What the comparison says, in a few sentences; a paragraph for each rival.

    Args:
        results: of the comparison.
        table: by `marble.compare.table.summarise`.
        baseline: arm that a verdict is given against, besides `RIVALS`.
    """
    missing = _missing(results)
    if not table:
        return "\n".join(["Nothing has been measured yet: no cell is finished.", *missing])
    name = _favourite(list(table), baseline)
    rivals = [arm for arm in dict.fromkeys([*RIVALS, baseline]) if arm in table and arm != name]
    rivals = rivals or [arm for arm in table if arm != name]
    parts = [_against(results, table, name, rival) for rival in rivals if rival is not None]
    return "\n".join([*parts, _standing(results, table, name), *missing, *_spent(results)])


def _missing(results: Results) -> list[str]:
    """Which cells are in no number."""
    lost = {name: [seed for seed in seeds if seed not in results.done[name]] for name, seeds in results.cells.items()}
    told = [
        f"{name} ({_seeds(seeds)}{', all of it' if not results.done[name] else ''})"
        for name, seeds in lost.items()
        if seeds
    ]
    return [f"Failed or unfinished, and in no number here: {', '.join(told)}."] if told else []


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _spent(results: Results) -> list[str]:
    """Which runs made other updates and images than most: they stopped early, or ran out of minutes."""
    made = {
        (name, seed): (run.updates, run.images) for name, seeds in results.done.items() for seed, run in seeds.items()
    }
    if len({*made.values()}) < 2:
        return []
    counts = Counter(made.values())
    usual = max(counts, key=lambda spent: (counts[spent], spent))
    others = [
        f"{name} (seed {seed}) {_budget(updates, images)}"
        for (name, seed), (updates, images) in made.items()
        if (updates, images) != usual
    ]
    return [f"Not one budget: {', '.join(others)}; the others {_budget(*usual)}."]


def _budget(updates: int, images: int) -> str:
    return f"made {updates} update{'s' if updates > 1 else ''} from {images} images"


def _favourite(arms: Sequence[str], baseline: str | None) -> str:
    if FAVOURITE in arms:
        return FAVOURITE
    return next((arm for arm in arms if arm not in RIVALS and arm != baseline), arms[0])


def _against(results: Results, table: Mapping[str, Mapping[str, Any]], name: str, rival: str) -> str:
    found, count = duel(results, name, rival), len(results.training)
    ahead = sum(c.mean > 0 for c in found.rewards.values())
    more, less = (sum(c.sure == sign for c in found.rewards.values()) for sign in (1, -1))
    text = f"{_headline(found, name, rival)} ({_basis(found)}). "
    text += f"{name} gains more on {ahead} of {count} training rewards "
    text += f"({'surely' if found.seeds > 1 else 'with the whole bracket'} on {more}, less on {less}); "
    text += f"on average over them {found.mean.tell()} spreads of the base model's scores. "
    own, other = (f" ({reward})" if reward else "" for reward in found.weakest)
    text += f"Its worst reward{own} gains {found.worst.tell()} against {rival}'s worst{other}"
    text += ". " if found.worst.sure else ", which tells the two apart neither way. "
    gain = relative(results, name, rival)
    if gain["mean"] is not None:
        low, high = gain.get("prompts") or (gain["low"], gain["high"])
        told = Contrast(gain["mean"], low, high).tell("%", 100, 0)
        most = max(len(results.done[name]), len(results.done[rival]))
        seeds = f" (over {gain['seeds']} of {most} seeds)" if gain["seeds"] < most and found.common else ""
        text += f"Its scores relative to {rival}'s, averaged over the training rewards: {told}{seeds}. "
    return text + _cost(results, table, name, rival)


def _headline(found: Duel, name: str, rival: str) -> str:
    if found.mean.sure:
        more = "more" if found.mean.sure > 0 else "less"
        return f"{'With this one seed ' if found.seeds == 1 else ''}{name} gains {more} than {rival} on average"
    if found.mean.low is None:
        return f"{name} against {rival}: too few seeds for an interval, so that nothing is sure"
    return f"{name} and {rival} cannot be told apart by their mean gain"


def _basis(found: Duel) -> str:
    if found.seeds > 1:
        return (
            f"{found.seeds} seeds{', paired' if found.common > 1 else ''}, on these prompts; 95% intervals in brackets"
        )
    if not found.common:
        return "no seed in common"
    if found.mean.low is None:
        return "one seed, and a reward judges a single prompt"
    return "one seed, too few for an interval over seeds: brackets are 95% over prompts, and training again may differ"


def _cost(results: Results, table: Mapping[str, Mapping[str, Any]], name: str, rival: str) -> str:
    """How much longer it takes, where all runs of both had the same device, threads and jobs."""
    if len({run.place for arm in (name, rival) for run in results.done[arm].values()}) > 1:
        return ""
    ours, theirs = table[name]["seconds"], table[rival]["seconds"]
    return f"It takes {ours / theirs:.2f} times as long." if ours and theirs else ""


def _standing(results: Results, table: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Who has the highest composite, how surely, and who made what worse than the base model."""
    scores = composites(results)
    order = sorted(scores, key=lambda arm: (-scores[arm], arm is None))
    arms = [arm for arm in order if arm is not None]
    text = f"Highest composite z of the {len(arms)} arms: {arms[0]} ({_signed(scores[arms[0]], 2)})"
    if order[0] is None:
        text += f", below the base model ({_signed(scores[None], 2)})"
    if len(arms) > 1:
        text += _apart(results, arms[0], arms[1])
    if name not in arms[:2]:
        text += f"; {name} is number {arms.index(name) + 1} ({_signed(scores[name], 2)})"
    fallen = {arm: row["below_base"] for arm, row in table.items() if row["below_base"]}
    text += ". Below the base model (95%): "
    return text + ("; ".join(f"{arm} on {', '.join(names)}" for arm, names in fallen.items()) or "nothing") + "."


def _apart(results: Results, first: str, second: str) -> str:
    """Whether the first two of a ranking differ by more than seeds do."""
    by_seed, score = composites_by_seed(results), _signed(composites(results)[second], 2)
    if not by_seed:
        return f"; next {second} ({score}), with too few seeds that all arms have to tell the two apart"
    found = contrast(by_seed[first], by_seed[second])
    if found.sure:
        return f", ahead of {second} ({score}) by {found.tell()}"
    return f", which cannot be told apart from {second} ({score}): {found.tell()}"
