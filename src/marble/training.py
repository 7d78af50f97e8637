"""The training loop: prompts → rollout → rewards → advantages → objectives → gradients → balance → update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marble.config import Config
from marble.distributed import agree, barrier, decide, is_main, rank, share, start, world
from marble.errors import MarbleError
from marble.export import finish_run
from marble.heldout import HeldOut
from marble.resume import restore, snapshot
from marble.rewards import Judging
from marble.rewards.gather import gather_table
from marble.rollout import collect
from marble.run import Run, choose_folder
from marble.setup import Parts, assemble, check_config, check_processes
from marble.step import make_update, plan_updates

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
        MarbleError: the configuration, model or folder will not do: nothing has been written then; or the run cannot go
            on, because rewards have stopped answering, say: it is saved then.
    """
    start()
    check_config(config)
    check_processes(config)
    out = Path(decide(lambda: str(choose_folder(out, resume))))
    parts = assemble(config)
    barrier()  # nothing is written if a process did not get as far
    run = Run(out) if resume else Run.create(out, config)
    held_out = HeldOut(run, config, parts)
    epoch, spent = restore(parts, held_out, run) if resume else (0, 0.0)
    held_out.before()
    began, asked, fallen = time.perf_counter() - spent, False, held_out.fallen
    lost: list[str] = []  # rewards that have stopped answering
    over = fallen or _spent(config, parts, time.perf_counter() - began)

    try:
        while not over:
            clock = [time.perf_counter()]
            batch = parts.prompts.batch(epoch)
            shares = [share(len(batch.prompts), process) for process in range(world())]
            mine = batch.part(shares[rank()])
            frames = config.rollout.judged_frames
            judging = Judging(parts.rewards, mine.records, mine.group_ids, frames=frames)
            rollout = collect(
                parts.policy,
                mine,
                steps=config.rollout.steps,
                images_per_call=config.rollout.batch,
                guidance=config.rollout.guidance,
                scheduler=config.rollout.scheduler,
                noise=config.rollout.noise,
                offset=mine.start,
                prompts=len(shares[0]),
                seen=judging.add,  # rewards with threads of their own judge while the next images are made
            )
            clock.append(time.perf_counter())
            table = gather_table(judging.table(), mine.images, len(batch.seeds))
            if table.silent and not table.applies.any():  # nothing is left to learn from
                lost = table.silent
                _checkpoint(config, parts, run, held_out, epoch, time.perf_counter() - began)
                break
            signals = parts.method.signals(table, batch.group_ids)
            parts.method.observe(table)
            clock.append(time.perf_counter())
            plan = plan_updates(config, parts, rollout, batch, shares, epoch, signals)
            made = parts.updater.updates
            for visits in plan:
                if fallen or config.budget.updates == parts.updater.updates:
                    break
                metrics = make_update(config, parts, rollout, signals, visits)
                done = parts.updater.updates
                metrics |= {"epoch": epoch, "images": (epoch + 1) * len(batch.seeds), **table.metrics()}
                metrics["time"] = {"rollout": clock[1] - clock[0], "rewards": clock[2] - clock[1], **judging.times()}
                metrics["time"]["elapsed"] = time.perf_counter() - began
                if config.evaluation.every and done % config.evaluation.every == 0:
                    evaluated, fallen = held_out.on_the_way()
                    metrics |= evaluated
                run.log(metrics)
                asked = agree(is_main() and watch(metrics)) or asked
            parts.updater.end_epoch()
            parts.absence.count(table, parts.updater.updates - made)
            lost = parts.absence.lost
            epoch += 1
            spent = time.perf_counter() - began
            over = asked or fallen or bool(lost) or _spent(config, parts, spent)
            if over or parts.updater.updates % config.checkpoint_every < len(plan):
                _checkpoint(config, parts, run, held_out, epoch, spent)
    except Exception:
        _export(parts, run)  # what was learned until then
        raise
    _export(parts, run)
    if lost:
        raise MarbleError(parts.absence.message(lost, parts.updater.updates))
    if not asked:
        held_out.after()
    return run


def _checkpoint(config: Config, parts: Parts, run: Run, held_out: HeldOut, epoch: int, spent: float) -> None:
    run.save_checkpoint(parts.updater.updates, snapshot(parts, held_out, epoch, spent), config.keep_checkpoints)


def _export(parts: Parts, run: Run) -> None:
    if is_main() and parts.updater.updates:
        parts.policy.save(run.path)
        finish_run(run)


def _spent(config: Config, parts: Parts, seconds: float) -> bool:
    """Whether the budget is spent, by the main process's clock."""
    updates, minutes = config.budget.updates, config.budget.minutes
    if updates is not None and parts.updater.updates >= updates:
        return True
    return minutes is not None and agree(seconds >= minutes * 60)
