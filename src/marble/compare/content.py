"""What `comparison.json` holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble.compare.overrides import public_overrides
from marble.compare.results import Result, Results
from marble.compare.table import choose_baseline, composites, summarise
from marble.compare.verdict import verdict
from marble.errors import MarbleError
from marble.export import public_rewards
from marble.statistics import seed_interval
from marble.storage import write_atomic

FILE = "comparison.json"


def describe(
    results: Results, config: Mapping[str, Any], baseline: str | None = None, remarks: Sequence[str] = ()
) -> dict[str, Any]:
    """A comparison as plain data; docs/guide.md says what every key means.

    Args:
        results: of its cells.
        config: the mapping that all arms have in common.
        baseline: arm over which relative gains are taken; scalarised PPO or else the weighted sum, if not given or
            not finished.
        remarks: what else the reader should know.

    Raises:
        MarbleError: the baseline is not an arm.
    """
    if baseline is not None and baseline not in results.cells:
        raise MarbleError(f'baseline: "{baseline}" is not an arm; those are: {", ".join(results.cells)}')
    chosen, notes = choose_baseline(results, baseline), [*remarks]
    if baseline is not None and chosen is None:
        chosen = choose_baseline(results)
        instead = f"are over {chosen}" if chosen else "are left out"
        notes.append(f'baseline: "{baseline}" has no finished run; relative gains {instead}')
    table, first = summarise(results, chosen), results.first
    arms = {}
    for name, seeds in results.cells.items():
        told = {str(seed): cell | _cell(results, results.done[name].get(seed)) for seed, cell in sorted(seeds.items())}
        arms[name] = {
            "overrides": public_overrides(results.overrides[name]),
            "seeds": told,
            "summary": table.get(name),
            "curves": curves(results, name),
        }
    content = {
        "config": public_rewards(dict(config)),
        "training_rewards": results.training,
        "held_out_rewards": results.held_out,
        "base": dict(zip(results.rewards, first.base.tolist(), strict=True)) if first else {},
        "spread": dict(zip(results.rewards, first.spread.tolist(), strict=True)) if first else {},
        "base_composite_z": composites(results).get(None),
        "arms": arms,
        "baseline": chosen,
        "notes": notes,
        "verdict": verdict(results, table, chosen),
    }
    return _plain(content)


def _cell(results: Results, result: Result | None) -> dict[str, Any]:
    if result is None:
        return {}
    return {
        "means": dict(zip(results.rewards, result.means.tolist(), strict=True)),
        "gains": dict(zip(results.rewards, result.gains.tolist(), strict=True)),
        "seconds": result.seconds,
        "memory": result.memory,
        "images": result.images,
        "updates": result.updates,
    }


def curves(results: Results, name: str) -> dict[str, dict[str, list[Any]]]:
    """Reward → `updates`, `mean`, `low` and `high` over seeds, of the held-out means on the way.

    Only updates at which all of the arm's finished runs were evaluated; no band of fewer than two seeds.
    """
    runs = [dict(run.curve) for run in results.done[name].values()]
    common = sorted(set.intersection(*(set(curve) for curve in runs))) if runs else []
    out: dict[str, dict[str, list[Any]]] = {}
    for reward in results.rewards:
        line: dict[str, list[Any]] = {"updates": [], "mean": [], "low": [], "high": []}
        for update in common:
            values = [value for curve in runs if (value := curve[update].get(reward)) is not None]
            if values:
                low, high = seed_interval(np.array(values)) or (None, None)
                point = {"updates": update, "mean": float(np.mean(values)), "low": low, "high": high}
                for key, value in point.items():
                    line[key].append(value)
        if len(line["updates"]) > 1:
            out[reward] = line
    return out


def _plain(node: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def write_comparison(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `comparison.json` into a folder; returns its path."""
    write_atomic(path / FILE, json.dumps(content, indent=1) + "\n")
    return path / FILE


def load_comparison(path: Path) -> dict[str, Any]:
    """The content of `comparison.json`, by its own path or its folder's.

    Raises:
        MarbleError: it is not there, or is something else.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MarbleError(f'"{path}" holds no comparison that can be read: {error}') from error
    if not isinstance(content, dict) or not {"arms", "training_rewards", "verdict"} <= set(content):
        raise MarbleError(f"{file} is not what marble compare writes: it has no arms, training_rewards or verdict")
    return content


def table_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row an arm, the best composite first: what a data frame takes.

    Args:
        content: by `load_comparison`.

    Returns:
        `arm`, `seeds`, `mean/REWARD` and `gain/REWARD`, each with `…/low` and `…/high`, and the other columns.
    """
    rows = []
    for name, arm in content["arms"].items():
        summary = arm["summary"]
        if summary is None:
            continue
        row: dict[str, Any] = {"arm": name}
        for key, value in summary.items():
            prefix = {"means": "mean/", "gains": "gain/"}.get(key)
            if prefix:
                for reward, found in value.items():
                    row |= _flat(prefix + reward, found)
            elif isinstance(value, dict) and "mean" in value and key != "cosine":
                row |= _flat(key, value)
            elif key == "cosine":
                row |= {"cosine": value["mean"], "cosine/negative": value["negative"]}
            else:
                row[key] = value
        rows.append(row)
    return sorted(rows, key=lambda row: -row["composite_z"])


def _flat(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found["mean"], f"{name}/low": found["low"], f"{name}/high": found["high"]}
