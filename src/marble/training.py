"""The training loop: prompts → rollout → rewards → advantages → objectives → gradients → balance → update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from marble.balance.signals import signals_of
from marble.config import Config
from marble.errors import MarbleError
from marble.heldout import HeldOut
from marble.objectives.visit import plan_epoch
from marble.rewards import score_images
from marble.rollout import collect
from marble.run import Run, check_output, free_folder
from marble.setup import Parts, assemble, check_config
from marble.step import make_update

Watcher = Callable[[dict[str, Any]], bool]
"""Called with the metrics of every update; returns whether to stop after this epoch."""


def train(
    config: Config, out: Path | None = None, *, resume: bool = False, watch: Watcher = lambda metrics: False
) -> Run:
    """Fine-tune `config.model` on all of `config.rewards` at once.

    Args:
        config: a whole, checked configuration.
        out: the run folder; new, or with `resume` an existing run's. The first free of `runs/run`, `runs/run-2`, …
            if not given.
        resume: go on from the newest checkpoint of `out`.
        watch: called after every update; a true answer breaks the run off after the current epoch.

    Returns:
        The run, with its LoRA exported and, unless it was broken off, its evaluation written.

    Raises:
        MarbleError: the configuration, model or folder will not do; nothing has been written then.
    """
    check_config(config)
    out = free_folder(Path("runs/run")) if out is None else Path(out)
    if resume:
        Run(out)
    else:
        check_output(out)
    parts = assemble(config)
    run = Run(out) if resume else Run.create(out, config)
    held_out = HeldOut(run, config, parts)
    state = run.load_checkpoint() if resume else None
    epoch, spent = _restore(parts, held_out, run, state)
    held_out.before()
    start, asked, fallen = time.perf_counter() - spent, False, held_out.fallen

    while not (asked or fallen) and not _spent(config, parts, time.perf_counter() - start):
        began = time.perf_counter()
        batch = parts.prompts.batch(epoch)
        rollout = collect(parts.policy, batch, steps=config.rollout.steps, images_per_call=config.rollout.batch)
        sampled = time.perf_counter()
        table = score_images(parts.rewards, rollout.images, batch.records, batch.group_ids)
        signals = signals_of(table, batch.group_ids, parts.weights, std=config.objective.std)
        parts.method.observe(table)
        scored = time.perf_counter()
        plan = plan_epoch(
            len(rollout.x0),
            config.rollout.steps,
            timesteps=config.objective.timesteps,
            updates=config.optimizer.updates_per_epoch,
            micro_batch=config.optimizer.micro_batch,
            seed=config.seed,
            epoch=epoch,
        )
        for visits in plan:
            if fallen or config.budget.updates == parts.updater.updates:
                break
            metrics = make_update(config, parts, rollout, signals, visits)
            done = parts.updater.updates
            metrics |= {"epoch": epoch, "images": (epoch + 1) * len(rollout.x0)}
            metrics["reward"] = {n: _mean(table.scores[:, k]) for k, n in enumerate(table.names)}
            metrics["time"] = {
                "rollout": sampled - began,
                "rewards": scored - sampled,
                "elapsed": time.perf_counter() - start,
            }
            if config.evaluation.every and done % config.evaluation.every == 0:
                metrics["held_out"], fallen = held_out.on_the_way()
            run.log(metrics)
            asked = watch(metrics) or asked
        parts.updater.end_epoch()
        epoch += 1
        spent = time.perf_counter() - start
        last = asked or fallen or _spent(config, parts, spent)
        if last or parts.updater.updates % config.checkpoint_every < len(plan):
            run.save_checkpoint(parts.updater.updates, _state(parts, held_out, epoch, spent), config.keep_checkpoints)
    parts.policy.save_lora(run.path / "lora")
    if not asked:
        held_out.after()
    return run


def _mean(scores: Tensor) -> float | None:
    known = scores[~scores.isnan()]
    return known.mean().item() if len(known) else None


def _spent(config: Config, parts: Parts, seconds: float) -> bool:
    budget = config.budget
    if budget.updates is not None and parts.updater.updates >= budget.updates:
        return True
    return budget.minutes is not None and seconds >= budget.minutes * 60


def _state(parts: Parts, held_out: HeldOut, epoch: int, spent: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "seconds": spent,
        "adapters": {name: parts.policy.adapter_state(name) for name in ("default", "old", "ema")},
        "updater": parts.updater.state_dict(),
        "method": parts.method.state_dict(),
        "held_out": held_out.state_dict(),
    }


def _restore(parts: Parts, held_out: HeldOut, run: Run, state: dict[str, Any] | None) -> tuple[int, float]:
    if state is None:  # a new run, or one broken off before its first checkpoint
        run.forget_after(0)
        return 0, 0.0
    if "method" not in state:
        raise MarbleError(f"{run.path}: its checkpoint is of an earlier version of marble; start the run anew")
    for name, weights in state["adapters"].items():
        parts.policy.load_adapter_state(name, weights)
    parts.updater.load_state_dict(state["updater"])
    parts.method.load_state_dict(state["method"])
    held_out.load_state_dict(state["held_out"])
    run.forget_after(parts.updater.updates)
    return state["epoch"], state["seconds"]
