"""What is compared: an arm is a name and the settings that it lays over the comparison's configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from marble.catalogue import ARMS, METHODS, SPECIALIST, SPECIALISTS
from marble.config import Config, make_config
from marble.errors import MarbleError, nearest
from marble.overrides import put, read_value
from marble.rules import knows_floors, knows_priorities

_PPO = "ppo"
_PPO_HAS_ITS_OWN = ("clip", "kl", "old")
"""Settings of `objective` that mean something else to PPO, whose presets they would stand in the way of."""
_CELLS_OWN = {"seed": "--seeds", "threads": "--threads"}
"""Settings that are every cell's, not an arm's, and what sets them."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted setting → value
    specialist: str | None = None  # label of the one reward that it trains on


def parse_arms(texts: Sequence[str], labels: Sequence[str]) -> list[Arm]:
    """Arms as the command line names them.

    Args:
        texts: `BASE`, `BASE:setting=value,…` or either with `NAME=` before it.
        labels: of the configuration's training rewards, for specialists.

    Raises:
        MarbleError: unknown names, or an arm given twice.
    """
    wanted: list[str] = []
    for text in texts:
        wanted += [SPECIALIST + label for label in labels] if text == SPECIALISTS else [text]
    arms = [_parse(text, labels) for text in wanted]
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MarbleError(f"methods: {', '.join(twice)} given more than once")
    for i, arm in enumerate(arms):
        for other in arms[:i]:
            if (arm.overrides, arm.specialist) == (other.overrides, other.specialist):
                raise MarbleError(f'methods: "{other.name}" and "{arm.name}" are the same arm')
    return arms


def _parse(text: str, labels: Sequence[str]) -> Arm:
    head, equals, tail = text.partition("=")
    named = bool(equals) and ":" not in head
    name, what = (head, tail) if named else (text, text)
    if not name or not what:
        raise MarbleError(f'methods: "{text}": expected BASE, BASE:setting=value,… or NAME=BASE:setting=value,…')
    base, settings = _split_base(what, labels)
    overrides, specialist = _base(base, labels)
    for part in re.split(r",(?=[A-Za-z_][\w.-]*=)", settings) if settings else []:
        setting, equals, value = part.partition("=")
        if not equals:
            raise MarbleError(f'methods: "{text}": expected setting=value after the colon, got "{part}"')
        setting = setting.replace("-", "_")
        if setting in _CELLS_OWN:
            use = _CELLS_OWN[setting]
            raise MarbleError(f'methods: "{text}": {setting} is not an arm\'s to set, got {value}; use {use}')
        overrides = overrides | {setting: read_value(value, f'methods: "{text}": {setting}')}
    return Arm(name, overrides, specialist)


def _split_base(what: str, labels: Sequence[str]) -> tuple[str, str]:
    """`specialist:REWARD:settings` or `METHOD:settings` in two; a reward's label may hold colons itself."""
    if what.startswith(SPECIALIST):
        rest = what.removeprefix(SPECIALIST)
        for label in sorted(labels, key=len, reverse=True):
            if rest == label or rest.startswith(label + ":"):
                return SPECIALIST + label, rest[len(label) + 1 :]
        return what, ""
    base, _, settings = what.partition(":")
    return base, settings


def _base(base: str, labels: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The settings of a named arm, and the reward of a specialist."""
    if base.startswith(SPECIALIST):
        label = base.removeprefix(SPECIALIST)
        if label not in labels:
            known = f"Training rewards: {', '.join(labels)}"
            raise MarbleError(
                f'methods: no training reward "{label}" for a specialist.{nearest(label, labels)} {known}'
            )
        return {"balance.method": "weighted-sum"}, label
    if base in ARMS:
        return dict(ARMS[base][1]), None
    if base in METHODS:
        return {"balance.method": base}, None
    names = [*METHODS, *ARMS, SPECIALISTS]
    known = ", ".join([*names, f"{SPECIALIST}REWARD"])
    raise MarbleError(f'methods: unknown "{base}".{nearest(base, names)} Known (marble list arms): {known}')


def configure(values: dict[str, Any], arm: Arm, seed: int) -> Config:
    """The configuration of a cell.

    What `values` set for the method or objective that they name is left out for an arm that names another: each starts
    from its own presets. So are the floors and priorities of the rewards, if the other method knows none.

    Args:
        values: mapping of the comparison's configuration, as it was given.
        arm: what to lay over it.
        seed: of the cell.

    Raises:
        MarbleError: the arm's settings do not fit; says whose they are.
    """
    laid, given = copy.deepcopy(values), make_config(values)
    if arm.overrides.get("balance.method", given.balance.method) != given.balance.method:
        laid["balance"] = {}
        laid["rewards"] = [_without_wishes(use, arm.overrides["balance.method"]) for use in laid["rewards"]]
    objective = arm.overrides.get("objective.name", given.objective.name)
    if objective != given.objective.name and _PPO in (objective, given.objective.name):
        kept = {name: value for name, value in (laid.get("objective") or {}).items() if name not in _PPO_HAS_ITS_OWN}
        laid["objective"] = kept
    if arm.specialist is not None:
        _specialise(laid, arm.specialist)
    for setting, value in arm.overrides.items():
        put(laid, setting, value, f'methods: arm "{arm.name}": {setting}')
    laid["seed"] = seed
    return make_config(laid, f'arm "{arm.name}"')


def _without_wishes(use: Any, method: str) -> Any:
    """A training reward's mapping, or its name alone, without what the method does not know."""
    known = {"floor": knows_floors(method), "priority": knows_priorities(method)}
    return {key: value for key, value in use.items() if known.get(key, True)} if isinstance(use, dict) else use


def remarks(given: Config, arm: Arm, config: Config) -> list[str]:
    """What the user should know of an arm before waiting for it.

    Args:
        given: the comparison's configuration.
        arm: an arm.
        config: of one of its cells.
    """
    found, method = [], config.balance.method
    if arm.specialist is None and method != given.balance.method:
        floors = any(term.floor for term in given.rewards) and not knows_floors(method)
        priorities = any(term.priority != 1 for term in given.rewards) and not knows_priorities(method)
        wishes = " and ".join(["floors"] * floors + ["priorities"] * priorities)
        found += [f'arm "{arm.name}": {method} knows no {wishes}; the rewards\' are left out'] if wishes else []
    rollout, optimizer = config.rollout, config.optimizer
    visits = rollout.prompts * rollout.group_size * config.objective.timesteps // optimizer.updates_per_epoch
    if config.balance.solve_share < 1 and visits <= optimizer.micro_batch:
        found.append(
            f'arm "{arm.name}": an update\'s {visits} visits are one micro-batch, so that a solve looks at all of '
            f"them; give it a smaller one: optimizer.micro_batch={max(1, visits // 8)}"
        )
    return found


def _specialise(values: dict[str, Any], label: str) -> None:
    """Train on one reward; the other training rewards are held out, and judged in the evaluation."""
    given = make_config(values)
    terms = {term.label: term.model_dump(mode="json") for term in given.rewards}
    used = ("reward", "url", "settings")
    others = [{key: term[key] for key in used} for name, term in terms.items() if name != label]
    values["rewards"] = [{key: terms[label][key] for key in used}]
    values["held_out_rewards"] = [*others, *values.get("held_out_rewards", [])]
