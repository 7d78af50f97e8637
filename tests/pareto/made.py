"""Run folders and measured points written by hand."""

import json
from pathlib import Path

import numpy as np
import torch

from marble.config import make_config
from marble.evaluation import Evaluation, fixed_seeds
from marble.pareto.measure import Measured
from marble.pareto.points import Point
from marble.pareto.runs import read_sources
from marble.run import Run

ALL = ["mini-aesthetic", "mini-alignment", "mini-text"]


def config_of(trained, **sections):
    """Of a run trained on some of `ALL`, by 2 prompts and an image each of the mini world."""
    values = {
        "prompts": [{"source": "mini-places"}],
        "rewards": [{"reward": name} for name in trained],
        "held_out_rewards": [name for name in ALL if name not in trained],
        "evaluation": {"prompts": 2, "images": 1, "steps": 2},
    }
    for name, change in sections.items():
        values[name] = values.get(name, {}) | change if isinstance(change, dict) else change
    return make_config(values)


def made_run(folder: Path, trained=("mini-aesthetic",), *, finished=True, updates=(0, 5), steps=(), **sections):
    """A run folder without weights; `steps` are its checkpoints'."""
    run = Run.create(folder, config_of(list(trained), **sections))
    names = [name.removeprefix("mini-") for name in ALL]
    table = {"names": names, "prompts": ["a", "b"], "scores": [[0.1] * 3, [0.2] * 3]}
    own = [name.removeprefix("mini-") for name in trained]
    content = {
        "training_rewards": own,
        "seeds": fixed_seeds(1),
        "revisions": dict.fromkeys(names, "1"),
        "before": table,
    }
    run.write_evaluation(content | ({"after": table} if finished else {}))
    for update in updates:
        run.log({"update": update})
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        (place / "state.safetensors").touch()
    return folder


def comparison(folder: Path, arms):
    """A comparison's file: arm → seed → (status, run folder below `folder`)."""
    folder.mkdir(exist_ok=True)
    content = {
        arm: {"seeds": {seed: {"status": status, "folder": cell} for seed, (status, cell) in seeds.items()}}
        for arm, seeds in arms.items()
    }
    (folder / "comparison.json").write_text(json.dumps({"arms": content, "training_rewards": [], "verdict": ""}))
    return folder


def measured(scores, names=("a", "b"), *, kinds=None, methods=None, sources=None):
    """Points of `[M, prompts, K]` scores with an image each; the first is the base."""
    scores = np.asarray(scores, dtype=float)
    kinds = kinds or ["base"] + ["method"] * (len(scores) - 1)
    methods = methods or [""] + [f"m{i}" for i in range(1, len(scores))]
    sources = sources or [()] * len(scores)
    points = [Point(f"p{i}", kinds[i], methods[i], {}, tuple(sources[i])) for i in range(len(scores))]
    prompts = [f"prompt {i}" for i in range(scores.shape[1])]
    empty = torch.empty(0)
    return [
        Measured(point, Evaluation(list(names), torch.tensor(rows), prompts, empty), dict.fromkeys(names, "1"), "")
        for point, rows in zip(points, scores, strict=True)
    ]


def sources_of(*folders):
    return read_sources(folders).finished
