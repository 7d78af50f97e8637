"""Whole epochs of the embedded model: rollout, rewards, advantages, one update at 9 of 10 timesteps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from marble.bench.measure import interleaved, ratio, summary
from marble.bench.update import REFRESH
from marble.config import Config, demo_config_path, make_config, read_config
from marble.rewards import score_images
from marble.rollout import collect
from marble.setup import Parts, assemble
from marble.step import make_update, plan_updates

_SETTINGS: dict[str, dict[str, Any]] = {
    "weighted sum": {"method": "weighted-sum"},
    "exact": {"refresh": 1},
    f"amortised N={REFRESH}": {"refresh": REFRESH},
    f"amortised N={REFRESH}, solved on a third": {"refresh": REFRESH, "solve_share": 1 / 3},
}


def bench_epoch(*, repeats: int = 7, prompts: int = 6, group_size: int = 12, micro_batch: int = 72) -> dict[str, Any]:
    """Measure whole epochs of the demo's set-up at 10 sampling steps, 9 of them trained, one update an epoch.

    An epoch of an amortised arm is the mean of one with a solve and nine without, each measured in every round.

    Returns:
        For every arm `seconds` an epoch and `speed` against the weighted sum (medians and middle halves); `phases`:
        seconds of rollout, rewards and update of the weighted sum's last epoch.
    """
    base = read_config(demo_config_path())
    base["rollout"] |= {"prompts": prompts, "group_size": group_size, "steps": 10, "batch": prompts * group_size}
    base["objective"] |= {"timesteps": 9}
    base["optimizer"] |= {"updates_per_epoch": 1, "micro_batch": micro_batch}
    base |= {"diagnose_every": 0, "held_out_rewards": []}
    arms: dict[str, Callable[[], object]] = {}
    phases: dict[str, float] = {}
    for name, settings in _SETTINGS.items():
        config = make_config({**base, "balance": settings})
        parts = assemble(config)
        if settings.get("refresh") == REFRESH:
            arms[f"{name}: solve"] = _Epochs(config, parts, at=0)
            if "solve_share" not in settings:
                arms[f"{name}: between"] = _Epochs(config, parts, at=1)
        else:
            arms[name] = _Epochs(config, parts, phases=phases if name == "weighted sum" else None)
    seconds = interleaved(arms, repeats, torch.device("cpu"))
    between = seconds.pop(f"amortised N={REFRESH}: between")
    for name in [name for name in seconds if name.endswith(": solve")]:
        pairs = zip(seconds.pop(name), between, strict=True)
        seconds[name.removesuffix(": solve")] = [(s + (REFRESH - 1) * b) / REFRESH for s, b in pairs]
    plain = seconds["weighted sum"]
    rows = {name: {"seconds": summary(values), "speed": ratio(plain, values)} for name, values in seconds.items()}
    images = prompts * group_size
    return {"images": images, "micro_batch": micro_batch, "repeats": repeats, "phases": phases, "arms": rows}


class _Epochs:
    """Runs one epoch after another; `at` holds the schedule at one of its updates."""

    def __init__(
        self, config: Config, parts: Parts, *, at: int | None = None, phases: dict[str, float] | None = None
    ) -> None:
        self.config, self.parts, self.at, self.phases, self.epoch = config, parts, at, phases, 0

    def __call__(self) -> None:
        config, parts = self.config, self.parts
        if self.at is not None and parts.method.balancer is not None:
            parts.method.balancer.done = self.at
        batch, began = parts.prompts.batch(self.epoch), time.perf_counter()
        rollout = collect(parts.policy, batch, steps=config.rollout.steps, images_per_call=config.rollout.batch)
        sampled = time.perf_counter()
        table = score_images(parts.rewards, rollout.images, batch.records, batch.group_ids)
        scored = time.perf_counter()
        signals = parts.method.signals(table, batch.group_ids)
        plan = plan_updates(config, parts, rollout, batch, [range(len(batch.prompts))], self.epoch, signals)
        metrics = make_update(config, parts, rollout, signals, plan[0])
        parts.updater.end_epoch()
        self.epoch += 1
        if self.phases is not None:
            seconds = {"rollout": sampled - began, "rewards": scored - sampled, "update": metrics["update_seconds"]}
            self.phases |= seconds
