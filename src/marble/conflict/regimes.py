"""What was measured of when balancing beats a sum: `regimes.json` beside this file, if it is there.

    {"schema": 1, "about": "the runs that it comes from: command, world, seeds",
     "cells": [{"mismatch": 10, "specialist_share": 0.2, "conflict": -0.3,
                "mean": {"method": "gdpo"}, "worst": {"method": "marble", "norms": "raw"},
                "suggested": {"method": "marble"}, "seeds": 2}, …]}

| key | |
|---|---|
| `mismatch` | largest over smallest spread within prompts, weights of the sum included; ≥ 1 |
| `specialist_share` | smallest share of the prompts that one of the rewards can judge, above 0 to 1 |
| `conflict` | smallest true cosine of two rewards' gradients on the base model that is known to ± 0.3; −1 to 1 |
| `mean`, `worst` | `balance` of the arm that gained most on average, and most for the worst-off reward, less defaults |
| `suggested` | `balance` of the arm that led the default in both on every seed, by most; or the default |
| `seeds` | how many every arm had |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
FILE = Path(__file__).with_name("regimes.json")
_STEPS = {"mismatch": math.log(10), "specialist_share": math.log(3), "conflict": 0.5}
"""How far apart the map's cells lie, the first two in logarithms: what is further from all of them is unknown."""

_KNOWN = 0.6
"""Width of a true cosine's interval up to which it says where on the map a case lies."""


@dataclass(frozen=True)
class Regime:
    """One measured cell; fields as in the file."""

    mismatch: float
    specialist_share: float
    conflict: float
    mean: Mapping[str, Any]
    worst: Mapping[str, Any]
    suggested: Mapping[str, Any]
    seeds: int

    def distance(self, mismatch: float, specialist_share: float, conflict: float) -> float:
        """In steps of the map, along the axis on which it is furthest."""
        return max(
            abs(math.log(self.mismatch / mismatch)) / _STEPS["mismatch"],
            abs(math.log(self.specialist_share / specialist_share)) / _STEPS["specialist_share"],
            abs(self.conflict - conflict) / _STEPS["conflict"],
        )


def axes_of(content: Mapping[str, Any]) -> dict[str, float | None]:
    """Where on the map a measured case lies, from what `conflict.json` holds; None where that is not known."""
    scores, cosines = content["scores"], content["gradients"]["cosines_true"]
    table = {key: np.array(cosines[key], dtype=float) for key in ("estimate", "low", "high")}
    upper = np.triu(np.ones(table["low"].shape, dtype=bool), 1)
    known = table["estimate"][upper & (table["high"] - table["low"] <= _KNOWN)]
    return {
        "mismatch": scores["mismatch"],
        "specialist_share": min(row["judges"] for row in scores["rewards"].values()) or None,
        "conflict": float(known.min()) if len(known) else None,
    }


def read_regimes(path: Path = FILE) -> list[Regime]:
    """The map's cells; none if it has not been made.

    Raises:
        ValueError: it is of another schema, a cell's place is not known, or an arm is no `balance` with a method.
    """
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["schema"] != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {content['schema']}")
    for number, cell in enumerate(content["cells"]):
        _check_cell(cell, f"{path}: cells.{number}")
    return [Regime(**cell) for cell in content["cells"]]


def _check_cell(cell: Mapping[str, Any], where: str) -> None:
    for axis in _STEPS:
        if not isinstance(cell[axis], (int, float)):
            raise ValueError(f"{where}.{axis} must be a number, got {cell[axis]!r}; leave out a cell that has none")
    for arm in ("mean", "worst", "suggested"):
        if not isinstance(cell[arm], dict) or "method" not in cell[arm]:
            raise ValueError(f"{where}.{arm} must be settings of balance with a method, got {cell[arm]!r}")


def nearest_regime(
    regimes: Sequence[Regime], mismatch: float | None, specialist_share: float | None, conflict: float | None
) -> Regime | None:
    """The cell that is most like this case; None if none is within a step, or something is not known."""
    if not regimes or mismatch is None or specialist_share is None or conflict is None:
        return None
    best = min(regimes, key=lambda regime: regime.distance(mismatch, specialist_share, conflict))
    return best if best.distance(mismatch, specialist_share, conflict) <= 1 else None
