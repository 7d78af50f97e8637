"""What is unlike in two descriptions of an evaluation, in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One line for each of `keys` under which plain JSON differs: its first difference, what stands there and here."""
    return [_first(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _first(where: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return f"{where}: {', '.join(old) or 'none'} there, {', '.join(new) or 'none'} here"
        key = next(key for key in old if old[key] != new[key])
        return _first(f"{where}.{key}", old[key], new[key])
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: {len(old)} there, {len(new)} here"
        i = next(i for i in range(len(old)) if old[i] != new[i])
        return _first(f"{where}.{i}", old[i], new[i])
    return f"{where}: {_shown(old)} there, {_shown(new)} here"


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
