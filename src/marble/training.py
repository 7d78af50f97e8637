"""The training loop: prompts → rollout → rewards → advantages → objectives → gradients → balance → update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from marble.balance.signals import signals_of
from marble.config import Config
from marble.distributed import agree, decide, is_main, rank, share, start, total, world
from marble.errors import MarbleError
from marble.export import finish_run
from marble.heldout import HeldOut
from marble.objectives.visit import plan_epoch
from marble.resume import restore, snapshot
from marble.rewards import score_images
from marble.rewards.gather import gather_table
from marble.rollout import collect
from marble.run import Run, choose_folder
from marble.setup import Parts, assemble, check_config, check_processes
from marble.step import make_update

Watcher = Callable[[dict[str, Any]], bool]
"""Called in the main process with the metrics of every update; returns whether to stop after this epoch."""


def train(
    config: Config, out: Path | None = None, *, resume: bool = False, watch: Watcher = lambda metrics: False
) -> Run:
    """Fine-tune `config.model` on all of `config.rewards` at once, in every process that a launcher started.

    Args:
        config: a whole, checked configuration; the same in all processes.
        out: the run folder; new, or with `resume` an existing run's. The first free of `runs/run`, `runs/run-2`, …
            if not given. Only the main process reads and writes it.
        resume: go on from the newest checkpoint of `out`.
        watch: called after every update; a true answer breaks the run off after the current epoch.

    Returns:
        The run, with what was learned exported and, unless it was broken off, its evaluation written.

    Raises:
        MarbleError: the configuration, model or folder will not do; nothing has been written then.
    """
    start()
    check_config(config)
    check_processes(config)
    out = Path(decide(lambda: str(choose_folder(out, resume))))
    parts = assemble(config)
    run = Run(out) if resume else Run.create(out, config)
    held_out = HeldOut(run, config, parts)
    epoch, spent = restore(parts, held_out, run) if resume else (0, 0.0)
    held_out.before()
    began, asked, fallen = time.perf_counter() - spent, False, held_out.fallen
    over = fallen or _spent(config, parts, time.perf_counter() - began)

    try:
        while not over:
            clock = [time.perf_counter()]
            batch = parts.prompts.batch(epoch)
            shares = [share(len(batch.prompts), process) for process in range(world())]
            mine = batch.part(shares[rank()])
            rollout = collect(
                parts.policy,
                mine,
                steps=config.rollout.steps,
                images_per_call=config.rollout.batch,
                guidance=config.rollout.guidance,
                scheduler=config.rollout.scheduler,
                offset=mine.start,
                prompts=len(shares[0]),
            )
            clock.append(time.perf_counter())
            frames = config.rollout.judged_frames
            local = score_images(parts.rewards, rollout.images, mine.records, mine.group_ids, frames=frames)
            table = gather_table(local, mine.images, len(batch.seeds))
            signals = signals_of(table, batch.group_ids, parts.weights, std=config.objective.std)
            parts.method.observe(table)
            clock.append(time.perf_counter())
            tables = rollout.samples.conditioning.table_of
            mixed = parts.policy.in_step and total(tables.any().item()) > 0  # then not even sizes can be kept in step
            plan = plan_epoch(
                len(batch.seeds),
                len(rollout.samples.levels),
                timesteps=config.objective.timesteps,
                updates=config.optimizer.updates_per_epoch,
                micro_batch=1 if mixed else config.optimizer.micro_batch,
                seed=config.seed,
                epoch=epoch,
                own=mine.images,
                tables=tables,
                in_step=[batch.part(own).images for own in shares] if parts.policy.in_step else [],
            )
            for visits in plan:
                if fallen or config.budget.updates == parts.updater.updates:
                    break
                metrics = make_update(config, parts, rollout, signals, visits)
                done = parts.updater.updates
                metrics |= {"epoch": epoch, "images": (epoch + 1) * len(batch.seeds)}
                metrics["reward"] = {n: _mean(table.scores[:, k]) for k, n in enumerate(table.names)}
                metrics["time"] = {
                    "rollout": clock[1] - clock[0],
                    "rewards": clock[2] - clock[1],
                    "elapsed": time.perf_counter() - began,
                }
                if config.evaluation.every and done % config.evaluation.every == 0:
                    metrics["held_out"], fallen = held_out.on_the_way()
                run.log(metrics)
                asked = agree(is_main() and watch(metrics)) or asked
            parts.updater.end_epoch()
            epoch += 1
            spent = time.perf_counter() - began
            over = asked or fallen or _spent(config, parts, spent)
            if over or parts.updater.updates % config.checkpoint_every < len(plan):
                run.save_checkpoint(
                    parts.updater.updates, snapshot(parts, held_out, epoch, spent), config.keep_checkpoints
                )
    except (MarbleError, RuntimeError):
        _export(parts, run)  # what was learned until then
        raise
    _export(parts, run)
    if not asked:
        held_out.after()
    return run


def _export(parts: Parts, run: Run) -> None:
    if is_main() and parts.updater.updates:
        parts.policy.save(run.path)
        finish_run(run)


def _mean(scores: Tensor) -> float | None:
    known = scores[~scores.isnan()]
    return known.mean().item() if len(known) else None


def _spent(config: Config, parts: Parts, seconds: float) -> bool:
    """Whether the budget is spent, by the main process's clock."""
    updates, minutes = config.budget.updates, config.budget.minutes
    if updates is not None and parts.updater.updates >= updates:
        return True
    return minutes is not None and agree(seconds >= minutes * 60)
