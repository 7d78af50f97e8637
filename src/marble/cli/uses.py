"""Rewards as they are named on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from marble.config import RewardUse
from marble.errors import MarbleError, nearest


def uses_of(names: Sequence[str], settings: str | None) -> list[RewardUse]:
    """Rewards by name, with `--settings`, a JSON object by reward.

    Raises:
        MarbleError: no name, not JSON, or settings of a reward that is not named.
    """
    if not names:
        raise MarbleError("rewards: give at least one; marble list rewards shows those there are")
    given = read_mapping("--settings", settings)
    for name, value in given.items():
        if name not in names:
            raise MarbleError(f'--settings: "{name}" is none of the rewards.{nearest(name, names)}')
        if not isinstance(value, dict):
            raise MarbleError(f'--settings: those of "{name}" must be an object, got {json.dumps(value)}')
    return [RewardUse(reward=name, settings=given.get(name, {})) for name in names]


def read_mapping(flag: str, text: str | None) -> dict[str, Any]:
    """A JSON object given on the command line; empty if it is not given.

    Raises:
        MarbleError: it is no JSON object.
    """
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise MarbleError(f"{flag}: is not JSON ({error}), got {text}") from error
    if not isinstance(value, dict):
        raise MarbleError(f"{flag}: must be a JSON object, got {text}")
    return value
