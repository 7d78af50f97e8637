"""Measures how the rewards of a config disagree on its model, and writes it down."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from marble.config import Config
from marble.conflict.advice import advise
from marble.conflict.directions import describe_gradients
from marble.conflict.gather import Gathered, Watcher, gather
from marble.conflict.page import conflict_page
from marble.conflict.regimes import read_regimes
from marble.conflict.scores import describe_scores
from marble.errors import MarbleError
from marble.run import check_output
from marble.setup import assemble, check_config
from marble.storage import write_atomic

LEAST_BATCHES = 3
"""Fewer have no interval: leaving one out must leave two to multiply."""


def check_conflict(config: Config, batches: int) -> None:
    """All that can be found wrong without loading a model.

    Raises:
        MarbleError: one reward, too few batches, several processes, or what `check_config` finds.
    """
    if len(config.rewards) < 2:
        raise MarbleError(
            f"rewards: one reward alone has nothing to conflict with, got {config.rewards[0].label}; give at least two"
        )
    if batches < LEAST_BATCHES:
        raise MarbleError(
            f"--batches: at least {LEAST_BATCHES}, got {batches}; noise is told from gradients by comparing batches"
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 or config.model.shard:
        asked = "model.shard" if config.model.shard else f"{processes} processes"
        raise MarbleError(f"marble conflict runs in one process, got {asked}; start it without a launcher")
    check_config(config)


def measure_conflict(
    config: Config, batches: int, out: Path, watch: Watcher = lambda done, whole: None
) -> dict[str, Any]:
    """Measure, and write `conflict.json` and `conflict.html`.

    Args:
        config: of the training to come; checked.
        batches: epochs to sample, at least 3; nothing is trained.
        out: folder, new or empty; made when all is measured.
        watch: told of every update looked at.

    Returns:
        What conflict.json holds; every key has a line in `docs/metrics.md`.

    Raises:
        MarbleError: the config or folder will not do, or a gradient is not finite.
    """
    check_conflict(config, batches)
    check_output(out)
    began = time.perf_counter()
    found = gather(config, assemble(alone(config)), batches, watch)
    content = describe(config, found, batches)
    content["seconds"] = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "conflict.html", conflict_page(content, found.scores, found.sources, found.pictures))
    write_atomic(out / "conflict.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def alone(config: Config) -> Config:
    """Without what this does not need: held-out rewards, and the distance to the base model, which is zero here."""
    return config.model_copy(
        update={"held_out_rewards": [], "objective": config.objective.model_copy(update={"kl": 0.0})}
    )


def describe(config: Config, found: Gathered, batches: int) -> dict[str, Any]:
    """Everything but the time."""
    content: dict[str, Any] = {
        "model": config.model.id,
        "rewards": found.names,
        "setup": {
            "batches": batches,
            "prompts": config.rollout.prompts,
            "group_size": config.rollout.group_size,
            "updates": config.optimizer.updates_per_epoch,
            "visits": found.visits,
            "parameters": found.parameters,
            "objective": config.objective.name,
            "std": config.objective.std,
            "seed": config.seed,
            "weights": dict(zip(found.names, found.weights.tolist(), strict=True)),
        },
        "scores": describe_scores(
            found.names,
            found.scores,
            found.judgeable,
            torch.cat(found.groups).numpy(),
            torch.cat(found.advantages).numpy(),
            found.weights,
        ),
        "gradients": describe_gradients(found.names, found.grams, found.signal, found.across),
    }
    return content | {"advice": advise(content, read_regimes()).to_json()}
