"""Rules that turn what was measured into a suggested set-up: each with its number, its reason and what to do.

Where the regime map (`regimes.py`) has measured a case like this one, what did best there is suggested; otherwise a
method follows from the findings. A rule that does not fire says nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from marble.catalogue import FROM_GRADIENTS
from marble.conflict.regimes import Regime, axes_of, nearest_regime

SPREADS = 3.0
"""Spreads of scores that differ by more than this are not to be summed raw."""
SPECIALIST = 0.5
"""A reward that can judge a smaller share of the prompts is a specialist."""
CONSTANT = 0.5
"""A reward that finds all images alike in a larger share of its prompts has little to teach."""
REDUNDANT = 0.9
"""Two rewards whose scores within prompts, or whose gradients, surely correlate by more are one."""
SHARED = 10
"""Fewer prompts whose images both tell apart say nothing sure of how two rewards' scores correlate."""
SHOWN = 0.2
"""One update that shows less of a reward's gradient than this share is mostly noise for it."""
OPPOSED = 0.1
"""A direction that opposes some reward in more updates than this is worth saying so."""
MARBLE: Mapping[str, Any] = {"method": "marble"}
TURNED: Mapping[str, Any] = {"method": "upgrad", "visits": "importance"}
"""Where rewards truly conflict, min-norm weights go to the opposed ones and starve the rest (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Finding:
    """What one rule found."""

    rule: str
    rewards: list[str]
    number: float | None
    finding: str
    advice: str


@dataclass(frozen=True)
class Advice:
    """All findings, and settings that follow from them."""

    findings: list[Finding]
    balance: Mapping[str, Any]
    reason: str
    fragment: str  # YAML to lay into a config

    @property
    def method(self) -> str:
        """Of `balance`."""
        return str(self.balance["method"])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        suggested = {"method": self.method, "reason": self.reason, "config": self.fragment}
        return {"findings": [asdict(finding) for finding in self.findings], "suggested": suggested}


def advise(content: Mapping[str, Any], regimes: Sequence[Regime] = ()) -> Advice:
    """Judge what was measured.

    Args:
        content: of conflict.json, without the advice: `rewards`, `setup`, `scores`, `gradients`.
        regimes: cells of the regime map.
    """
    findings = [finding for rule in RULES for finding in rule(content)]
    fired = {finding.rule for finding in findings}
    regime = nearest_regime(regimes, **axes_of(content))
    balance, reason = _balance(fired, regime)
    if not fired & {"conflict", "spreads", "specialist", "opposed", "constant", "unseen"}:
        findings.append(_plain(content))
    return Advice(findings, balance, reason, _fragment(content, findings, balance))


def pairs(names: Sequence[str], table: Sequence[Sequence[Any]]) -> list[tuple[str, str, Any]]:
    """Every two rewards with their entry of a `[K, K]` table, those without one left out."""
    found = [(names[i], names[j], table[i][j]) for i, j in itertools.combinations(range(len(names)), 2)]
    return [(a, b, value) for a, b, value in found if value is not None]


# ---- the rules -----------------------------------------------------------------------------------------


def _constant(content: Mapping[str, Any]) -> list[Finding]:
    size, out = content["setup"]["group_size"], []
    for name, row in content["scores"]["rewards"].items():
        share = row["constant"]
        if share is None or share <= CONSTANT:
            continue
        found = f"{name} gives all {size} images of a prompt the same score for {_percent(share)} of its prompts."
        todo = "It learns from the others alone: more images a prompt (rollout.group_size) or easier prompts."
        if share == 1:
            todo = "It has nothing to teach this model: leave it out, or give it prompts that the model can get right."
        out.append(Finding("constant", [name], share, found, todo))
    return out


def _spreads(content: Mapping[str, Any]) -> list[Finding]:
    mismatch, rows = content["scores"]["mismatch"], content["scores"]["rewards"]
    if mismatch is None or mismatch <= SPREADS:
        return []
    top = max(rows, key=lambda name: rows[name]["owns"])
    found = (
        f"Within prompts the weighted scores spread {mismatch:.3g} times as far for one reward as for another; "
        f"{_percent(rows[top]['owns'])} of the raw sum's variance is {top}'s."
    )
    todo = "Do not sum raw scores: give each reward its own advantage (any method but weighted-sum and sequential)."
    return [Finding("spreads", [top], mismatch, found, todo)]


def _specialist(content: Mapping[str, Any]) -> list[Finding]:
    shares = {name: row["judges"] for name, row in content["scores"]["rewards"].items()}
    few = {name: share for name, share in shares.items() if share < SPECIALIST}
    if not few:
        return []
    prompts = min(few.values()) * content["setup"]["prompts"]
    found = f"Specialists: {_shares(few)} of the prompts can be judged, for the rarest about {prompts:.3g} a batch."
    todo = (
        "A specialist's gradient is an average over few images: short, which balance.norms: folded makes up for, and "
        "noisy: give its prompts a larger share (prompts.N.share) or the batch more of them (rollout.prompts)."
    )
    return [Finding("specialist", list(few), min(few.values()), found, todo)]


def _redundant(content: Mapping[str, Any]) -> list[Finding]:
    names, scores, cosines = content["rewards"], content["scores"], content["gradients"]["cosines_true"]
    tables = scores["pearson"], scores["pearson_low"], scores["jointly_prompts"], cosines["estimate"], cosines["low"]
    pearson, pearson_low, shared, cosine, cosine_low = ({(a, b): v for a, b, v in pairs(names, t)} for t in tables)
    todo = (
        "A min-norm method (marble) counts the two once, so nothing has to change for it; the second only costs the "
        "time to score it, and could be held out. Methods that add rewards up count them twice: halve both weights "
        "(rewards.N.weight) for sums, both priorities (rewards.N.priority) for uniform and gdpo."
    )
    out = []
    for a, b in itertools.combinations(names, 2):
        if shared[a, b] >= SHARED and pearson_low.get((a, b), 0.0) > REDUNDANT:
            number = pearson[a, b]
            found = f"{a} and {b} correlate by {number:.2f} within prompts."
        elif cosine_low.get((a, b), 0.0) > REDUNDANT:
            number = cosine[a, b]
            found = (
                f"{a} and {b} ask the same of this model: their gradients' cosine is {number:+.2f}, noise taken out."
            )
        else:
            continue
        out.append(Finding("redundant", [a, b], number, found, todo))
    return out


def _conflict(content: Mapping[str, Any]) -> list[Finding]:
    cosines, out = content["gradients"]["cosines_true"], []
    sure = {(a, b) for a, b, flag in pairs(content["rewards"], cosines["conflict"]) if flag}
    for a, b, value in pairs(content["rewards"], cosines["estimate"]):
        if (a, b) in sure:
            found = f"{a} and {b} truly conflict: their gradients' cosine is {value:+.2f} once noise is taken out."
            todo = (
                "No direction serves both fully: say which you prefer (rewards.N.priority), or which must not be "
                "traded away (rewards.N.floor: true), and look at their Pareto front before you settle."
            )
            out.append(Finding("conflict", [a, b], value, found, todo))
    return out


def _opposed(content: Mapping[str, Any]) -> list[Finding]:
    """What the raw sum surely works against; or, if single updates show conflict, whether more than noise is known."""
    seen, true = (content["gradients"]["directions"]["weighted_sum"][key] for key in ("advantage", "true"))
    if true is not None and true["against"]:
        cosines = {name: true["cosines"][name] for name in true["against"]}
        found = f"The raw weighted sum truly works against {_signed(cosines)} (cosines, noise taken out)."
        todo = "Take a method that weighs every reward's own gradient or advantage."
        return [Finding("opposed", list(cosines), min(cosines.values()), found, todo)]
    if seen is None or seen["conflict_rate_low"] <= OPPOSED:
        return []
    most, rate = max(seen["against"], key=lambda name: seen["against"][name]), seen["conflict_rate"]
    found = (
        f"The raw weighted sum has a negative cosine with at least one reward in {_percent(rate)} of the updates, most "
        f"often with {most} ({_percent(seen['against'][most])})."
    )
    unknown = [name for name in seen["against"] if true is not None and true["cosines"][name] is None]
    if true is None or unknown:
        whom = ", ".join(unknown) or "any of them"
        found += f" Whether it truly works against {whom} cannot be known from so few batches."
        todo = "Measure with more --batches; until then, a method that weighs every reward's own gradient is safer."
        return [Finding("opposed", [most], rate, found, todo)]
    interval = "" if true["worst_low"] is None else f" ({true['worst_low']:+.2f} to {true['worst_high']:+.2f})"
    found += (
        f" Noise alone may do that: taken out, the smallest cosine is {true['worst']:+.2f}{interval}, with "
        f"{true['worst_reward']}, and none is surely negative."
    )
    todo = "By itself no reason for another method: more prompts an update show more gradient and less noise."
    return [Finding("by-noise", [most], rate, found, todo)]


def _unseen(content: Mapping[str, Any]) -> list[Finding]:
    norms = content["gradients"]["norms"]
    lost = [name for name, row in norms.items() if row["one_batch"] and not row["known"]]
    if not lost:
        return []
    batches = content["setup"]["batches"]
    found = f"In {batches} batches the gradient of {', '.join(lost)} cannot be told from noise."
    todo = "True cosines with it are not known: measure with more --batches, train with more prompts an update."
    return [Finding("unseen", lost, None, found, todo)]


def _noise(content: Mapping[str, Any]) -> list[Finding]:
    norms = content["gradients"]["norms"]
    little = {name: row["shown"] for name, row in norms.items() if row["shown"] is not None and row["shown"] < SHOWN}
    if not little:
        return []
    most = max(norms[name]["batches_needed"] for name in little)
    found = (
        f"Of what one update shows of a reward's gradient little is gradient: {_shares(little)}; the rest is noise. "
        f"Up to {most:.0f} updates' images are needed to show as much gradient as noise."
    )
    todo = "More prompts an update: a larger rollout.prompts, or a smaller optimizer.updates_per_epoch."
    return [Finding("noise", list(little), min(little.values()), found, todo)]


RULES: tuple[Callable[[Mapping[str, Any]], list[Finding]], ...] = (
    _conflict,
    _opposed,
    _spreads,
    _specialist,
    _constant,
    _redundant,
    _unseen,
    _noise,
)


def _plain(content: Mapping[str, Any]) -> Finding:
    mismatch = content["scores"]["mismatch"]
    found = "No two rewards are sure to conflict, none judges few prompts only, and their spreads are alike."
    return Finding("plain", list(content["rewards"]), mismatch, found, "A plain sum will do as well as any balancing.")


# ---- what follows --------------------------------------------------------------------------------------


def _balance(fired: set[str], regime: Regime | None) -> tuple[Mapping[str, Any], str]:
    """Settings of `balance`, and why."""
    if regime is not None:
        like = (
            f"a case measured before (spreads {regime.mismatch:g} times apart, a specialist for "
            f"{_percent(regime.specialist_share)} of the prompts, smallest true cosine {regime.conflict:+.2g})"
        )
        led = (
            f"{_named(regime.suggested)} gained more than {_named(MARBLE)} both on average and for the worst-off reward"
        )
        if regime.suggested == MARBLE:
            led = f"no method gained more than {_named(MARBLE)} both on average and for the worst-off reward"
        most = f"most on average: {_named(regime.mean)}; most for the worst-off: {_named(regime.worst)}"
        return regime.suggested, f"in {like} {led}, seed by seed ({regime.seeds} seeds; {most})"
    if "conflict" in fired:
        return TURNED, (
            "rewards truly conflict: min-norm weights (marble, before its guard acts) would go to the opposed ones, "
            "which cancel, and leave the others next to nothing; upgrad turns each gradient until it opposes none, "
            "and keeps all of them in"
        )
    if fired & {"spreads", "specialist", "opposed"}:
        return MARBLE, (
            "each reward gets its own advantage and an equal say; where no true conflict is found, gdpo and uniform do "
            "the same without a solve and may do as well"
        )
    if "unseen" in fired:
        return MARBLE, "too little is known of the gradients to rely on a plain sum"
    return {"method": "weighted-sum"}, "nothing was found that a plain sum would get wrong"


def _named(balance: Mapping[str, Any]) -> str:
    """A method with its other settings in brackets."""
    others = ", ".join(f"{key}: {value}" for key, value in balance.items() if key != "method")
    return f"{balance['method']} ({others})" if others else str(balance["method"])


def _fragment(content: Mapping[str, Any], findings: Sequence[Finding], balance: Mapping[str, Any]) -> str:
    lines, fired = yaml.safe_dump({"balance": dict(balance)}, sort_keys=False).splitlines(), {f.rule for f in findings}
    folds = balance["method"] in (*FROM_GRADIENTS, "uniform") and balance["method"] != "published"
    if "specialist" in fired and folds and "norms" not in balance:
        lines.append("  norms: folded  # specialists' gradients are short")
    if fired & {"noise", "unseen"}:
        lines.append(f"# rollout: {{prompts: {2 * content['setup']['prompts']}}}  # twice the images an update")
    for finding in findings:
        if finding.rule == "conflict":
            lines.append(f"# rewards: floor: true for {_comment(finding.rewards[0])} or {_comment(finding.rewards[1])}")
        if finding.rule == "redundant":
            lines.append(f"# rewards: one of {_comment(finding.rewards[0])} and {_comment(finding.rewards[1])} will do")
    return "\n".join(lines) + "\n"


def headline(content: Mapping[str, Any]) -> str:
    """The whole in a few sentences."""
    rewards, cosines = content["rewards"], content["gradients"]["cosines_true"]
    known = pairs(rewards, cosines["estimate"])
    against, along = (sum(flag for *_, flag in pairs(rewards, cosines[key])) for key in ("conflict", "agree"))
    possible = len(rewards) * (len(rewards) - 1) // 2
    parts = []
    seen = content["gradients"]["directions"]["weighted_sum"]["advantage"]
    if seen is not None:
        parts.append(
            f"The raw weighted sum works against at least one of {len(rewards)} rewards in "
            f"{_percent(seen['conflict_rate'])} of the updates, noise included."
        )
    if not known:
        parts.append("No pair's true cosine could be measured in so few batches.")
    else:
        some = (
            f"{against} of {possible} pairs of rewards truly conflict" if against else "no two rewards surely conflict"
        )
        parts.append(f"Noise taken out, {some} and {along} of {possible} pairs surely agree.")
    mismatch = content["scores"]["mismatch"]
    if mismatch is not None:
        parts.append(f"Their scores' spreads lie {mismatch:.3g} times apart.")
    return " ".join(parts)


def _comment(name: str) -> str:
    return " ".join(name.split())


def _signed(cosines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:+.2f}" for name, value in cosines.items())


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
