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
    due, every = method.due(), config.diagnose_every
    if not due:
        method.advance()
    diagnose = bool(every) and updater.updates % every == every // 2
    combined = method.combined(signals)
    count, letter = len(signals.signal), due and method.to_the_letter
    columns = _columns(signals, combined) if diagnose else _columns(signals)
    rows, own, free, loss_sum, kl_sum = None, None, None, 0.0, 0.0
    for visits in plan:
        loss, kl = visit_loss(policy, rollout, visits, config.objective)
        share, chosen = len(visits) / total, visits.images
        if diagnose or (due and not letter):
            rows = _add(rows, share * reference_gradients(loss, columns[chosen], policy.parameters))
        if letter:
            advantages, applies = signals.per_reward[chosen], signals.applies[chosen]
            own = _add(own, share * reference_gradients(loss, advantages, policy.parameters, applies))
            if diagnose:
                nothing = torch.zeros_like(advantages)
                free = _add(free, share * reference_gradients(loss, nothing, policy.parameters, applies))
        each = loss.at(combined[chosen]).mean()
        wanted = [each] if not due and rows is None else []
        if kl is not None:
            wanted.append(config.objective.kl * kl)
            kl_sum += share * kl.item()
        if wanted:
            (share * torch.stack(wanted).sum()).backward()
        loss_sum += share * each.item()

    direction = None
    if due:
        gradients = own if own is not None else rows
        assert gradients is not None
        direction = method.refresh(gradients, signals, free)
    elif rows is not None:
        direction = Direction(rows[-1], rows[count])
    norm = updater.apply(None if direction is None else direction.vector)
    metrics: dict[str, Any] = {"update": updater.updates, "loss": loss_sum, "kl": kl_sum, "gradient_norm": norm}
    metrics["signal"] = signals.signal.tolist()
    if method.balancer is not None:
        metrics["alpha"] = method.balancer.alpha.tolist()
        metrics["coefficients"] = method.balancer.coefficients.tolist()
        metrics["refreshed"] = due
    if diagnose and rows is not None and direction is not None:
        metrics |= worst_cosines(rows[:-1], direction, signals.signal)
        metrics["reward_cosines"] = reward_cosines(rows[:-1]).tolist()
    metrics["update_seconds"] = time.perf_counter() - began
    return metrics


def _columns(signals: Signals, combined: Tensor | None = None) -> Tensor:
    """Advantages to take gradients at: every reward's, none, and for a diagnosis the raw sum's and `combined`."""
    columns = [signals.per_reward, torch.zeros(len(signals.per_reward), 1)]
    if combined is not None:
        columns += [signals.weighted_sum[:, None], combined[:, None]]
    return torch.cat(columns, dim=1)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
