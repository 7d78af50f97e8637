"""One optimiser update: losses at the visits, gradients per reward when they are wanted, balance, step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from marble.balance.method import Direction, Signals
from marble.config import Config
from marble.diagnose import reward_cosines, worst_cosines
from marble.gradients import reference_gradients
from marble.objectives.visit import Visits, visit_loss
from marble.rollout import Rollout
from marble.setup import Parts


def make_update(config: Config, parts: Parts, rollout: Rollout, signals: Signals, plan: list[Visits]) -> dict[str, Any]:
    """Make one optimiser update from its micro-batches.

    Returns:
        The update's metrics; every key has a line in `docs/metrics.md`.
    """
    policy, method, updater = parts.policy, parts.method, parts.updater
    began, total = time.perf_counter(), sum(map(len, plan))
    due = method.due()
    every = config.diagnose_every
    diagnose = bool(every) and updater.updates % every == every // 2
    combined = method.combined(signals)
    columns = torch.cat(
        [signals.per_reward, torch.zeros(len(combined), 1), signals.weighted_sum[:, None], combined[:, None]], dim=1
    )
    rows, own, loss_sum, kl_sum = None, None, 0.0, 0.0
    for visits in plan:
        loss, kl = visit_loss(policy, rollout, visits, config.objective)
        share, at = len(visits) / total, columns[visits.images]
        if due or diagnose:
            wanted = at if diagnose else at[:, :-2]
            rows = _add(rows, share * reference_gradients(loss, wanted, policy.parameters))
        if due and method.to_the_letter:
            judged = signals.applies[visits.images]
            own = _add(
                own, share * reference_gradients(loss, signals.per_reward[visits.images], policy.parameters, judged)
            )
        each = loss.at(combined[visits.images]).mean()
        (share * (each * (0.0 if due else 1.0) + (0.0 if kl is None else config.objective.kl * kl))).backward()
        loss_sum += share * each.item()
        kl_sum += 0.0 if kl is None else share * kl.item()

    count = len(signals.signal)
    refreshed = rows
    if due and rows is not None:
        refreshed = rows[: count + 1] if own is None else torch.cat([own, rows[count : count + 1]])
    direction = method.step(refreshed if due else None, signals)
    norm = updater.apply(None if direction is None else direction.vector)
    metrics: dict[str, Any] = {"update": updater.updates, "loss": loss_sum, "kl": kl_sum, "gradient_norm": norm}
    metrics["signal"] = signals.signal.tolist()
    if method.balancer is not None:
        metrics["alpha"] = method.balancer.alpha.tolist()
        metrics["coefficients"] = method.balancer.coefficients.tolist()
        metrics["refreshed"] = due
    if diagnose and rows is not None:
        metrics |= _diagnosis(rows, direction, signals)
    metrics["update_seconds"] = time.perf_counter() - began
    return metrics


def _diagnosis(rows: Tensor, direction: Direction | None, signals: Signals) -> dict[str, Any]:
    applied = Direction(rows[-1], 1.0) if direction is None else direction
    found: dict[str, Any] = worst_cosines(rows[:-1], applied.vector, applied.const, signals.signal)
    found["reward_cosines"] = reward_cosines(rows[:-1]).tolist()
    return found


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
