"""Finished runs put side by side, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marble.compare.results import Result, Results, check_measured, read_result
from marble.compare.sameness import budget_of, different, measured, refuse, settings_of
from marble.config import Config
from marble.errors import MarbleError
from marble.run import Run


def side_by_side(paths: Sequence[Path]) -> tuple[Results, dict[str, Any]]:
    """Read runs and tell apart how they were trained.

    Runs that differ in nothing but the seed (and where and how fast they were made) are one arm, named by what tells
    it from the others.

    Args:
        paths: of two finished runs or more.

    Returns:
        Their results, and the settings of the first.

    Raises:
        MarbleError: a folder is no finished run, two have the same arm and seed, or budgets, prompts, evaluation or
            rewards differ (named), or one trains on several rewards that are not all.
    """
    if len(paths) < 2:
        raise MarbleError(f"runs: at least two run folders, got {len(paths)}")
    configs = [_finished(path).config for path in paths]
    evaluations = [Run(path).evaluation() for path in paths]
    for path, config, evaluation in zip(paths[1:], configs[1:], evaluations[1:], strict=True):
        found = different(budget_of(configs[0]), budget_of(config))
        refuse(found, str(paths[0]), str(path), "runs under different budgets cannot be compared")
        check_measured((paths[0], measured(evaluations[0])), (path, measured(evaluation)))
    settings = [settings_of(config) for config in configs]
    names = _names(configs, settings)
    most = max(evaluations, key=lambda evaluation: len(evaluation["training_rewards"]))
    training, held_out = most["training_rewards"], most["held_out_rewards"]
    _check_training(paths, evaluations, training)
    done: dict[str, dict[int, Result]] = {}
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for path, config, name in zip(paths, configs, names, strict=True):
        if config.seed in done.setdefault(name, {}):
            raise MarbleError(f"runs: {path} and {done[name][config.seed].folder} are {name} with seed {config.seed}")
        done[name][config.seed] = read_result(path, [*training, *held_out])
        cells.setdefault(name, {})[config.seed] = {"status": "done", "folder": str(path.resolve()), "error": None}
    shared = {key for key in settings[0] if all(other.get(key) == settings[0][key] for other in settings)}
    own = {
        name: {key: value for key, value in flat.items() if key not in shared}
        for name, flat in zip(names, settings, strict=True)
    }
    return Results(training, held_out, done, cells, own), configs[0].model_dump(mode="json")


def _check_training(paths: Sequence[Path], evaluations: Sequence[dict[str, Any]], whole: Sequence[str]) -> None:
    """Gains are told over one set of training rewards: every run has that, or is a specialist."""
    for path, evaluation in zip(paths, evaluations, strict=True):
        own = evaluation["training_rewards"]
        if {*own} != {*whole} and (len(own) > 1 or not {*own} <= {*whole}):
            raise MarbleError(
                f"runs: each trains on {', '.join(whole)} or on one of them, got {', '.join(own)} in {path}; compare "
                "runs of the same training rewards"
            )


def _finished(path: Path) -> Run:
    run = Run(path)
    if "after" not in run.evaluation():
        raise MarbleError(f'runs: "{path}" is not finished: go on with marble train --resume {path}')
    return run


def _names(configs: Sequence[Config], settings: Sequence[dict[str, Any]]) -> list[str]:
    """What each run is called: its method, and as much more as it takes to tell it from those of another kind."""
    kinds = [_kind(config) for config in configs]
    names = []
    for kind, flat in zip(kinds, settings, strict=True):
        alike = [other for other_kind, other in zip(kinds, settings, strict=True) if other_kind == kind]
        telling = [key for key in flat if any(other.get(key) != flat[key] for other in alike)]
        names.append(":".join([kind, *filter(None, [",".join(f"{key}={flat[key]}" for key in telling)])]))
    return names


def _kind(config: Config) -> str:
    """A run's arm as `marble compare` would name it, as far as method and objective go."""
    if len(config.rewards) == 1 and config.held_out_rewards:
        return f"specialist:{config.rewards[0].label}"
    method, objective = config.balance.method, config.objective.name
    if objective == "nft":
        return method
    return objective if method == "weighted-sum" else f"{method}:objective.name={objective}"
