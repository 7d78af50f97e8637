"""One optimiser update: losses at the visits, gradients per reward when they are wanted, balance, step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marble.balance.method import products
from marble.balance.signals import Signals
from marble.config import Config
from marble.diagnose import reward_cosines, worst_cosines
from marble.distributed import active, sum_gradients, total
from marble.errors import MarbleError
from marble.gradients.rows import Rows
from marble.memory import forget, is_out_of_memory
from marble.objectives.affine import AffineLoss
from marble.objectives.importance import expected_visits
from marble.objectives.visit import Visits, plan_epoch, visit_loss, where_broken
from marble.prompts import PromptBatch
from marble.rollout import Rollout
from marble.setup import Parts

log = logging.getLogger("marble")


def plan_updates(
    config: Config,
    parts: Parts,
    rollout: Rollout,
    batch: PromptBatch,
    shares: Sequence[range],
    epoch: int,
    signals: Signals | None = None,
) -> list[list[Visits]]:
    """What this process visits in every update of an epoch.

    Args:
        config: of the run.
        parts: of the run.
        rollout: the images that this process holds.
        batch: the prompts of all processes.
        shares: which of these prompts each process has.
        epoch: counted from 0.
        signals: of the images of all processes; without them visits are even, whatever `balance.visits` says.
    """
    images, expected = [batch.part(own).images for own in shares], None
    if signals is not None and config.balance.visits == "importance":
        settings, visits = config.objective, len(batch.seeds) * config.objective.timesteps
        scale = parts.updater.scale * config.optimizer.updates_per_epoch / visits  # as of an update's mean
        norms = parts.step_norms.measure(
            parts.policy, rollout, settings, images, seed=config.seed, epoch=epoch, scale=scale
        )
        most = 1.0 if settings.name == "ppo" else math.inf  # ppo has no fresh noise to visit a step again with
        advantages = parts.method.mixed(signals)[0].clamp(-settings.amax, settings.amax)  # the sum's alone, for sums
        expected = expected_visits(advantages, norms, settings.timesteps, most=most)
    tables, in_step = rollout.samples.conditioning.table_of, parts.policy.in_step
    mixed = in_step and total(tables.any().item()) > 0  # then not even sizes can be kept in step
    return plan_epoch(
        len(batch.seeds),
        len(rollout.samples.levels),
        timesteps=config.objective.timesteps,
        updates=config.optimizer.updates_per_epoch,
        micro_batch=1 if mixed else config.optimizer.micro_batch,
        seed=config.seed,
        epoch=epoch,
        own=rollout.batch.images,
        tables=tables,
        in_step=images if in_step else [],
        expected=expected,
    )


def make_update(config: Config, parts: Parts, rollout: Rollout, signals: Signals, plan: list[Visits]) -> dict[str, Any]:
    """Make one optimiser update from its micro-batches.

    Args:
        config: of the run.
        parts: of the run.
        rollout: the images that this process holds.
        signals: of the images of all processes.
        plan: this process's visits.

    Returns:
        The update's metrics; every key has a line in `docs/metrics.md`.
    """
    began = time.perf_counter()
    update = _Update(config, parts, signals, plan)
    update.gather(rollout, plan[: update.exact], exact=True)
    if update.rows is not None:  # even if this process has no visits: others may, and wait for it
        update.solve()
    update.gather(rollout, plan[update.exact :], exact=False)
    metrics = update.finish()
    return metrics | {"update_seconds": time.perf_counter() - began}


class _Update:
    """What one update has gathered.

    Its first `exact` micro-batches give the rows that the method asks for (and for a diagnosis that of the raw
    weighted sum, and of what the method mixes, if that is something else); the others take one backward pass of the
    mixed loss each.
    """

    def __init__(self, config: Config, parts: Parts, signals: Signals, plan: list[Visits]) -> None:
        self.names = [reward.name for reward in parts.rewards]
        self.kl_weight, self.objective, self.signals = config.objective.kl, config.objective, signals
        self.policy, self.method, self.engine, self.updater = parts.policy, parts.method, parts.engine, parts.updater
        self.visits = total(sum(visits.counts.sum().item() for visits in plan))
        every = config.diagnose_every
        self.diagnose = bool(every) and self.updater.updates % every == every // 2
        self.due = self.method.due()
        if not self.due:
            self.method.advance()
        self.advantages, self.weights = self.method.mixed(signals)
        self.apart = self.due and self.method.to_the_letter  # the distance to the base model stays out of the rows
        self.for_slope, self.for_const = self.method.columns(signals)
        self.rewards = self.for_slope.shape[1]
        self.exact, self.rows = 0, None
        self.complete = False  # whether the rows hold the whole update
        self.mixture: Tensor | None = None  # [R], the direction's
        if self.due or self.diagnose:
            share = config.balance.solve_share if self.due else 1.0
            self.exact = math.ceil(share * len(plan))
            self.complete = share == 1 and not (self.apart and self.kl_weight)
            if self.diagnose:
                others = [signals.weighted_sum[:, None]]
                others += [] if self.advantages is signals.per_reward else [self.advantages]
                self.for_slope = torch.cat([self.for_slope, *others], dim=1)
            self.rows = self._no_rows()
        self.engine.scale = self.updater.scale
        self.broken = ""  # whose gradients are not finite, if any are
        self.loss = self.kl = 0.0
        self.metrics: dict[str, Any] = {}

    def _no_rows(self) -> Rows:
        return self.engine.rows(self.for_slope.shape[1], self.for_const.shape[1])

    def gather(self, rollout: Rollout, plan: list[Visits], *, exact: bool) -> None:
        """Take in micro-batches; if memory does not suffice, all of them anew in halves.

        The halves are the same images at the same steps with the same noise: the sums are the same up to the order
        of summation.

        Raises:
            MarbleError: memory does not suffice for one image.
        """
        before = self.loss, self.kl, [None if p.grad is None else p.grad.clone() for p in self.policy.parameters]
        while True:
            if self.updater.most is not None:
                plan = [part for visits in plan for part in visits.split(self.updater.most)]
            try:
                for visits in plan:
                    self.visit(rollout, visits, exact=exact)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                largest = max(map(len, plan))
                if self.policy.in_step:
                    raise MarbleError(
                        f"out of memory with {largest} images in a forward and backward pass; with model.shard all "
                        "processes keep step, so that one cannot try again with fewer: use a lower "
                        "optimizer.micro_batch"
                    ) from error
                if largest == 1:
                    raise MarbleError(
                        "out of memory with one image in a forward and backward pass: use model.checkpointing, "
                        "model.dtype, model.quantize, a lower lora.rank, or smaller images (model.call)"
                    ) from error
            forget(self.policy.device)  # out here the error no longer holds on to its tensors
            self.updater.most = (largest + 1) // 2
            log.warning(
                "out of memory with %d images in a forward and backward pass; going on with at most %d, which changes "
                "no result (optimizer.micro_batch)",
                largest,
                self.updater.most,
            )
            self.loss, self.kl, gradients = before
            for parameter, gradient in zip(self.policy.parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            if exact:
                self.rows = self._no_rows()

    def visit(self, rollout: Rollout, visits: Visits, *, exact: bool) -> None:
        """Take in one micro-batch."""
        chosen, weight = visits.images + rollout.offset, visits.weights / self.visits
        if exact:
            with self.engine:
                loss, kl = visit_loss(self.policy, rollout, visits, self.objective)
                self._note(loss, kl, chosen, weight)
                self._insist(rollout, visits)
                weight = weight.to(loss.slope)
                slopes = weight[:, None] * loss.effective(self.for_slope[chosen].to(loss.slope))
                consts = weight[:, None] * self.for_const[chosen].to(slopes)
                if kl is not None and self.apart:
                    (self.updater.scale * self.kl_weight * (weight * kl).sum()).backward(retain_graph=True)
                elif kl is not None:
                    loss = replace(loss, const=loss.const + self.kl_weight * kl)
                assert self.rows is not None
                self.engine.accumulate(self.rows, loss, slopes, consts)
            return
        loss, kl = visit_loss(self.policy, rollout, visits, self.objective)
        each = self._note(loss, kl, chosen, weight)
        self._insist(rollout, visits)
        each = each if kl is None else each + self.kl_weight * kl
        (self.updater.scale * (weight.to(each) * each).sum()).backward()

    def _insist(self, rollout: Rollout, visits: Visits) -> None:
        """Stop before anything is lost if the loss so far is not finite: no scale of it would help."""
        if math.isfinite(self.loss + self.kl):
            return
        remedy = "a lower optimizer.lr" if self.policy.denoiser.dtype == torch.float32 else "model.dtype: float32"
        raise MarbleError(
            f"the loss of update {self.updater.updates + 1} is not finite, "
            f"{where_broken(self.policy, rollout, visits, self.objective)}; what was learned before is kept; "
            f"{remedy} usually helps"
        )

    def _note(self, loss: AffineLoss, kl: Tensor | None, chosen: Tensor, weight: Tensor) -> Tensor:
        """The mixed loss `[M]`, which is also what is logged."""
        each = (
            loss.const
            + (loss.effective(self.advantages[chosen].to(loss.slope)) @ self.weights.to(loss.slope)) * loss.slope
        )
        self.loss += (weight.to(each) * each.detach()).sum().item()
        self.kl += 0.0 if kl is None else (weight.to(kl) * kl.detach()).sum().item()
        return each

    def solve(self) -> None:
        """Turn the rows into a direction; the micro-batches that follow go by the fresh weights."""
        assert self.rows is not None
        if active():
            self.rows.sum_over_processes()
        gram = self.rows.gram()
        if not gram.isfinite().all():
            self.broken = self._blame(gram)
            if self.updater.scale > 1:
                return
        own = torch.cat([torch.arange(self.rewards), torch.arange(self.for_slope.shape[1], len(gram))])
        parts = torch.zeros(len(self.signals.signal) + 1, len(gram), dtype=torch.float64)
        parts[:, own] = self.method.parts()
        every = torch.eye(len(gram), dtype=torch.float64)
        if self.due:
            solved = self.method.solve(gram[own][:, own], self.signals)
            if solved is not None:
                self.mixture = torch.zeros(len(gram), dtype=torch.float64)
                self.mixture[own] = solved
            self.advantages, self.weights = self.method.mixed(self.signals)
        else:
            own_rows = self.advantages is self.signals.per_reward
            mixed = parts[:-1] if own_rows else every[self.rewards + 1 : self.for_slope.shape[1]]
            self.mixture = self.weights.double() @ mixed + parts[-1]
        if self.diagnose and self.mixture is not None:
            free = torch.arange(len(gram)) >= self.for_slope.shape[1]
            raw = every[self.rewards]
            directions = {
                "weighted_sum": (raw + parts[-1], raw),
                "applied": (self.mixture, torch.where(free, 0.0, self.mixture)),
            }
            self.metrics |= worst_cosines(gram, parts, self.signals.signal, directions)
            if self.metrics:
                self.metrics["reward_cosines"] = reward_cosines(products(parts[:-1], gram)).tolist()

    def _blame(self, gram: Tensor) -> str:
        """Whose gradients are not finite."""
        bad = [name for k, name in enumerate(self.names) if not gram[k, k].isfinite()]
        return f"that of {', '.join(bad) or 'the advantage-free part'}"

    def finish(self) -> dict[str, Any]:
        """Step, and say how it went."""
        if self.broken and self.updater.scale > 1:
            self.updater.back_off(self.broken)
            return {"update": self.updater.updates, "skipped": self.broken, "scale": self.updater.scale}
        if self.broken and self.due and self.mixture is None:  # nothing was solved, and no scale is left to try
            self.mixture = torch.ones(len(self.rows) if self.rows is not None else 0, dtype=torch.float64)
        direction = None
        if self.rows is not None and self.mixture is not None:
            direction = self.rows.mix(self.mixture)
        if not self.complete:
            sum_gradients(self.policy.parameters)
        norm = self.updater.apply(direction, self.broken)
        if math.isnan(norm):
            return {"update": self.updater.updates, "skipped": "the gradient as a whole", "scale": self.updater.scale}
        if self.policy.device.type == "cuda":
            self.metrics["memory"] = torch.cuda.max_memory_allocated(self.policy.device)
        metrics: dict[str, Any] = {
            "update": self.updater.updates,
            "loss": total(self.loss),
            "kl": total(self.kl),
            "gradient_norm": norm,
            "signal": self.signals.signal.tolist(),
        }
        balancer = self.method.balancer
        if balancer is not None:
            metrics["alpha"] = balancer.alpha.tolist()
            metrics["coefficients"] = balancer.coefficients.tolist()
            metrics["refreshed"] = self.due
            if self.due and balancer.missing.any():
                out = balancer.missing.nonzero().flatten().tolist()
                metrics["left_out"] = {self.names[k]: int(balancer.left_out[k]) for k in out}
            if self.due and self.method.opposition is not None and (opposed := self.method.opposition.pairs()):
                metrics["opposed"] = [[self.names[a], self.names[b]] for a, b in opposed]
        if self.method.controller is not None and balancer is not None:
            metrics["progress"] = self.method.controller.progress.tolist()
            metrics["priorities"] = balancer.priorities.tolist()
        return metrics | self.metrics
