"""What has to be equal for two runs to be compared, and where it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marble.config import Config
from marble.errors import MarbleError
from marble.rewards.base import WHERE

_INCIDENTAL = re.compile(
    r"seed|threads|checkpoint_every|keep_checkpoints|missing_limit|diagnose_every|rollout\.batch"
    r"|model\.(device|offload|checkpointing|vae_tiling|vae_slicing)"
    rf"|(held_out_)?rewards\.\d+\.(url|settings\.({'|'.join(WHERE)}))"
)
"""Settings that tell no two ways to train apart: where, how fast and from which seed a run is made."""

_BUDGET = re.compile(
    r"model\.(?!lora\.(rank|alpha|targets)|train$).*|prompts\.\d+\..*|rollout\.(prompts|group_size|steps|judged_frames)"
    r"|optimizer\.updates_per_epoch|budget\..*|evaluation\..*"
)
"""Settings that give all arms the same model, prompts, images, updates and evaluation."""

_SHOWN = 6
"""Differences named in one message."""

Difference = tuple[str, Any, Any]
"""What differs, ours, theirs."""


def settings_of(config: Config) -> dict[str, Any]:
    """Dotted setting → value, of all that say how a run trains."""
    flat: dict[str, Any] = {}
    _flatten(config.model_dump(mode="json"), "", flat)
    return {name: value for name, value in flat.items() if not _INCIDENTAL.fullmatch(name)}


def incidental_of(config: Config, *, given: bool = False) -> dict[str, Any]:
    """Dotted setting → value, of all that say where and how fast a run is made; of the seed nothing.

    Args:
        config: of a run or a comparison.
        given: only what was set, defaults left out.
    """
    flat: dict[str, Any] = {}
    _flatten(config.model_dump(mode="json", exclude_unset=given), "", flat)
    return {name: value for name, value in flat.items() if name != "seed" and _INCIDENTAL.fullmatch(name)}


def _flatten(node: Any, name: str, flat: dict[str, Any]) -> None:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _flatten(value, f"{name}.{key}" if name else str(key), flat)
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for i, item in enumerate(node):
            _flatten(item, f"{name}.{i}", flat)
    else:
        flat[name] = node


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """What two mappings do not agree on; what one of them lacks counts as None there."""
    return [
        (name, ours.get(name), theirs.get(name))
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def budget_of(config: Config) -> dict[str, Any]:
    """What all arms of a comparison have in common: `settings_of` that make the budget, and the rewards judged."""
    budget = {name: value for name, value in settings_of(config).items() if _BUDGET.fullmatch(name)}
    return budget | {f'reward "{label}"': what for label, what in _judged(config).items()}


def _judged(config: Config) -> dict[str, Any]:
    """Every evaluated reward, trained on or held out, with the settings that say what it judges."""
    return {
        use.label: {"reward": use.reward, **{k: v for k, v in use.settings.items() if k not in WHERE}}
        for use in [*config.rewards, *config.held_out_rewards]
    }


def measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What an `evaluation.json` was measured with."""
    scored = {f'revision of reward "{name}"': text for name, text in evaluation.get("revisions", {}).items()}
    return {
        "held-out prompts": evaluation["before"]["prompts"],
        "evaluation seeds": evaluation.get("seeds"),
        "evaluation.steps": evaluation.get("steps"),
        "evaluation.guidance": evaluation.get("guidance"),
    } | scored


def refuse(found: list[Difference], ours: str, theirs: str, why: str) -> None:
    """Raise if there are differences.

    Raises:
        MarbleError: names them: what it is in `ours` and in `theirs`, after `why` they matter.
    """
    if found:
        raise MarbleError(f"{why}:\n" + "\n".join(tell(found, ours, theirs)))


def tell(found: list[Difference], ours: str, theirs: str) -> list[str]:
    """A line for each difference, and one for how many more there are."""
    lines = [f"  {name}: {_short(one)} in {ours}, {_short(other)} in {theirs}" for name, one, other in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    return lines


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
