"""How noisy every reward's gradient is, by where its visits are, and at which steps it comes about.

    .venv/bin/python bench/visit_noise.py [--epochs 12]

Epochs of the demo with the base model. Each epoch's images are visited in several ways; what independent epochs agree
on (products across them) is the true gradient, and noise the rest. Squared norms throughout, relative to the true
gradient's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from marble.balance.method import Method
from marble.balance.signals import Signals
from marble.config import Config, demo_config_path, make_config, read_config
from marble.objectives.importance import expected_visits
from marble.objectives.visit import Visits, plan_epoch, visit_loss
from marble.rewards import score_images
from marble.rollout import Rollout, collect
from marble.setup import Parts, assemble

MICRO_BATCH = 72


def rows(config: Config, parts: Parts, rollout: Rollout, signals: Signals, visits: Visits) -> Tensor:
    """`[K, P]`, the part of every reward's gradient that its advantages make."""
    for_slope, for_const = Method(config).columns(signals)
    found = parts.engine.rows(for_slope.shape[1], for_const.shape[1])
    weight = visits.weights[:, None] / len(visits)
    with parts.engine:
        loss, _ = visit_loss(parts.policy, rollout, visits, config.objective)
        slopes = weight * loss.effective(for_slope[visits.images])
        parts.engine.accumulate(found, loss, slopes, weight * for_const[visits.images])
    return found.matrix()[: for_slope.shape[1]].double()


def ways(
    config: Config, parts: Parts, rollout: Rollout, signals: Signals, epoch: int
) -> Iterator[tuple[str, Tensor | None]]:
    """Names of ways to visit, and the `expected_visits` of each."""
    images, objective = len(rollout.x0), config.objective
    norms = parts.step_norms.measure(parts.policy, rollout, objective, [range(images)], seed=1, epoch=epoch)
    alike = torch.ones(images, 1)
    yield "even", None
    yield "importance of steps alone", expected_visits(alike, norms, objective.timesteps)
    advantages = signals.per_reward.clamp(-objective.amax, objective.amax)
    yield "importance of images alone", expected_visits(advantages, torch.ones_like(norms), objective.timesteps)
    yield "importance", expected_visits(advantages, norms, objective.timesteps)


def gather(config: Config, parts: Parts, epochs: int) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by way, `[E, U, K, P]` of every update, and by step, `[E, T − 1, K, P]` of all images once."""
    updates: dict[str, list[Tensor]] = {}
    by_step = []
    for epoch in range(epochs):
        batch = parts.prompts.batch(10_000 + epoch)
        rollout = collect(parts.policy, batch, steps=config.rollout.steps, images_per_call=config.rollout.batch)
        signals = parts.method.signals(
            score_images(parts.rewards, rollout.images, batch.records, batch.group_ids), batch.group_ids
        )
        count = len(rollout.x0)
        for name, expected in ways(config, parts, rollout, signals, epoch):
            plan = plan_epoch(
                count,
                config.rollout.steps,
                timesteps=config.objective.timesteps,
                updates=count * config.objective.timesteps // MICRO_BATCH,
                micro_batch=MICRO_BATCH,
                seed=1,
                epoch=epoch,
                expected=expected,
            )
            found = [rows(config, parts, rollout, signals, visits) for (visits,) in plan]
            updates.setdefault(name, []).append(torch.stack(found))
        each = []
        for step in range(config.rollout.steps - 1):
            seeds = tuple(range(count * epoch, count * (epoch + 1)))
            visits = Visits(torch.arange(count), torch.full((count,), step), seeds)
            halves = [rows(config, parts, rollout, signals, part) for part in visits.split(count // 2)]
            each.append(torch.stack(halves).mean(dim=0))
        by_step.append(torch.stack(each))
        print(f"{epoch + 1}/{epochs}", end="\r", flush=True)
    return {name: torch.stack(found) for name, found in updates.items()}, torch.stack(by_step)


def across(first: Tensor, second: Tensor) -> Tensor:
    """Inner products `[K]` of independent epochs' gradients `[E, K, P]`, averaged over all pairs of different ones."""
    total = (first.sum(dim=0) * second.sum(dim=0)).sum(dim=1) - (first * second).sum(dim=(0, 2))
    return total / (len(first) * (len(first) - 1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    config = make_config(read_config(demo_config_path()))
    parts = assemble(config)
    updates, by_step = gather(config, parts, args.epochs)
    names = [reward.name for reward in parts.rewards]
    whole = torch.stack([found.mean(dim=1) for found in updates.values()]).mean(dim=0)
    truth = across(whole, whole)

    def line(name: str, values: Tensor, digits: int = 1) -> None:
        print(f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in values.tolist()) + " |")

    print("| noise over truth | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for name, found in updates.items():
        line(f"{name}: an update", (found.square().sum(dim=3).mean(dim=(0, 1)) - truth) / truth)
        line(f"{name}: an epoch", (found.mean(dim=1).square().sum(dim=2).mean(dim=0) - truth) / truth)
    mean = by_step.mean(dim=1)
    every = across(mean, mean)
    for step in range(by_step.shape[1]):
        line(f"part of step {step + 1} in the whole", across(by_step[:, step], mean) / every / by_step.shape[1], 2)


if __name__ == "__main__":
    main()
