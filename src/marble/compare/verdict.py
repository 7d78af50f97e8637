"""One verdict in words, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from marble.compare.results import Results
from marble.compare.table import over_prompts, prompt_interval, relative, worst_reward
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
    two seeds.
    """
    common = [seed for seed in ours if seed in theirs]
    if len(common) > 1:
        each = np.array([ours[seed] - theirs[seed] for seed in common])
        low, high = seed_interval(each) or (None, None)
        return Contrast(float(each.mean()), low, high)
    if len(common) == 1 and len(ours) == len(theirs) == 1:
        return Contrast(ours[common[0]] - theirs[common[0]], None, None)
    a, b = np.array([*ours.values()]), np.array([*theirs.values()])
    if len(a) < 2 or len(b) < 2:
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
    if not table:
        return "Nothing has been measured yet: no cell is finished."
    name = _favourite(list(table), baseline)
    rivals = [arm for arm in dict.fromkeys([*RIVALS, baseline]) if arm in table and arm != name]
    rivals = rivals or [arm for arm in table if arm != name]
    parts = [_against(results, table, name, rival) for rival in rivals if rival is not None]
    parts.append(_standing(table, name))
    return "\n".join(part for part in parts if part)


def _favourite(arms: Sequence[str], baseline: str | None) -> str:
    if FAVOURITE in arms:
        return FAVOURITE
    return next((arm for arm in arms if arm not in RIVALS and arm != baseline), arms[0])


def _against(results: Results, table: Mapping[str, Mapping[str, Any]], name: str, rival: str) -> str:
    found, count = duel(results, name, rival), len(results.training)
    ahead = sum(c.mean > 0 for c in found.rewards.values())
    surely = [sum(c.sure == sign for c in found.rewards.values()) for sign in (1, -1)]
    text = f"{_headline(found, name, rival)} ({_basis(found)}). "
    text += f"{name} gains more on {ahead} of {count} training rewards "
    text += f"(surely on {surely[0]}, surely less on {surely[1]}); "
    text += f"on average over them {found.mean.tell()} spreads of the base model's scores. "
    own, other = (f" ({reward})" if reward else "" for reward in found.weakest)
    text += f"Its worst reward{own} gains {found.worst.tell()} against {rival}'s worst{other}"
    text += ". " if found.worst.sure else ", which tells the two apart neither way. "
    gain = relative(results, name, rival)
    if gain["mean"] is not None:
        over = Contrast(gain["mean"], gain["low"], gain["high"])
        text += f"Relative to {rival}'s scores that is {over.tell('%', 100, 0)} on average. "
    return text + _cost(table, name, rival)


def _headline(found: Duel, name: str, rival: str) -> str:
    if found.mean.sure:
        more = "more" if found.mean.sure > 0 else "less"
        return f"{'With this one seed ' if found.seeds == 1 else ''}{name} gains {more} than {rival} on average"
    if found.mean.low is None:
        return f"{name} against {rival}: too few seeds for an interval, so that nothing is sure"
    return f"{name} and {rival} cannot be told apart by their mean gain"


def _basis(found: Duel) -> str:
    if found.seeds > 1:
        return f"{found.seeds} seeds{', paired' if found.common > 1 else ''}; 95% intervals in brackets"
    if not found.common:
        return "no seed in common"
    if found.mean.low is None:
        return "one seed, and a reward judges a single prompt"
    return "one seed, too few for an interval over seeds: brackets are 95% over prompts, and training again may differ"


def _cost(table: Mapping[str, Mapping[str, Any]], name: str, rival: str) -> str:
    ours, theirs = table[name]["seconds"], table[rival]["seconds"]
    return f"It takes {ours / theirs:.2f} times as long." if ours and theirs else ""


def _standing(table: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Who has the highest composite, and who made what worse than the base model."""
    order = sorted(table, key=lambda arm: -table[arm]["composite_z"])
    text = f"Highest composite z of the {len(table)} arms: {order[0]} ({_signed(table[order[0]]['composite_z'], 2)})"
    if order[0] != name:
        text += f"; {name} is number {order.index(name) + 1} ({_signed(table[name]['composite_z'], 2)})"
    fallen = {arm: row["below_base"] for arm, row in table.items() if row["below_base"]}
    text += ". Below the base model (95%): "
    return text + ("; ".join(f"{arm} on {', '.join(names)}" for arm, names in fallen.items()) or "nothing") + "."
