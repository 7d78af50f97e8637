"""Batches of the model as it is: images, scores, and every reward's gradient in each update that training would make.

Nothing is trained. The LoRA is fresh: its second factors are zero, so that only these have gradients, which is what
training's first updates see. The trained policy is still the old one; the pull to it is zero then, and the whole
gradient of a reward is the part that its advantages enter. Visits are even, whatever `balance.visits` says: what one
update sees is noisier here than in training with `importance`, and the truth behind it the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from marble.balance.signals import Signals
from marble.config import Config
from marble.conflict.across import FOLDS, AcrossBatches
from marble.errors import MarbleError
from marble.gradients import Rows
from marble.memory import GIB, forget, free_bytes, is_out_of_memory
from marble.objectives.visit import Visits, visit_loss
from marble.prompts import PromptBatch
from marble.rewards import Judging, RewardTable
from marble.rewards.judging import to_bytes
from marble.rollout import Rollout, collect
from marble.setup import Parts
from marble.step import plan_updates

log = logging.getLogger("marble")

SHOWN = 12
"""Pictures kept for the page."""

Watcher = Callable[[int, int], object]
"""Told how many updates have been looked at, and of how many."""


@dataclass(frozen=True)
class Picture:
    """One sample on which the rewards disagree."""

    pixels: Tensor  # [3, H, W] uint8; of a video, its middle frame
    prompt: str
    scores: list[float]  # [K], NaN where missing
    advantages: list[float]  # [K]

    @property
    def discord(self) -> float:
        """How far the advantages of those that judged it lie apart."""
        judged = [a for a, score in zip(self.advantages, self.scores, strict=True) if score == score]
        return max(judged, default=0.0) - min(judged, default=0.0)


@dataclass
class Gathered:
    """What batches gave: M images, K rewards, R = K + 2 rows (own parts, the raw sum's, the common one)."""

    names: list[str]  # [K]
    weights: np.ndarray  # [K]
    across: AcrossBatches
    parameters: int  # P
    tables: list[RewardTable] = field(default_factory=list)  # one a batch
    advantages: list[Tensor] = field(default_factory=list)  # [N, K] a batch
    sources: list[str] = field(default_factory=list)  # [M]
    prompts: int = 0  # groups in all
    groups: list[Tensor] = field(default_factory=list)  # [N] a batch, counted on
    grams: list[list[Tensor]] = field(default_factory=list)  # [R, R] an update, batch after batch
    signal: list[Tensor] = field(default_factory=list)  # [K] bool a batch
    visits: int = 0  # of one update
    pictures: list[Picture] = field(default_factory=list)

    @property
    def scores(self) -> np.ndarray:
        """`[M, K]`."""
        return torch.cat([table.scores for table in self.tables]).numpy()

    @property
    def judgeable(self) -> np.ndarray:
        """`[M, K]` bool."""
        return torch.cat([table.wanted for table in self.tables]).numpy()


def gather(config: Config, parts: Parts, batches: int, watch: Watcher = lambda done, whole: None) -> Gathered:
    """Sample, judge and differentiate.

    Args:
        config: of the training to come; its first epochs' prompts and seeds are used.
        parts: of it, nothing trained yet.
        batches: epochs, at least 3.
        watch: told of every update.

    Raises:
        MarbleError: too little memory, a reward that never answers, or gradients that are not finite.
    """
    count, updates = len(parts.rewards), config.optimizer.updates_per_epoch
    _check_room(count + 2, parts.engine.count, batches)
    names = [reward.name for reward in parts.rewards]
    found = Gathered(names, parts.method.weights.numpy(), AcrossBatches(batches), parts.engine.count)
    taker = _Taker(config, parts)
    for number in range(batches):
        batch = parts.prompts.batch(number)
        rollout, table = _sample(config, parts, batch)
        if table.silent and not number:
            raise MarbleError(f"rewards: no score of {', '.join(table.silent)}; the warnings above say why")
        signals = parts.method.signals(table, batch.group_ids)
        _note(found, batch, table, signals)
        _keep_pictures(found, rollout, table, signals)
        plan = plan_updates(config, parts, rollout, batch, [range(len(batch.prompts))], number)
        sizes = [sum(map(len, visits)) for visits in plan]
        total = torch.zeros(count + 2, parts.engine.count)
        for done, (visits, size) in enumerate(zip(plan, sizes, strict=True)):
            rows, gram = taker.take(rollout, signals, visits)
            found.grams[-1].append(gram)
            total += rows.matrix().float().cpu() * (size / sum(sizes))
            watch(number * updates + done + 1, batches * updates)
        found.across.add(total)
        found.visits = max(sizes)
    return found


def _check_room(rows: int, parameters: int, batches: int) -> None:
    needed, free = 4 * rows * parameters * (min(batches, FOLDS) + 2), free_bytes(torch.device("cpu"))
    if needed > free:
        raise MarbleError(
            f"model: gradients of {parameters / 1e6:.1f} million trained parameters need {needed / GIB:.1f} GiB of the "
            f"CPU's memory, where {free / GIB:.1f} GiB are free; use a lower model.lora.rank or fewer --batches"
        )


def _sample(config: Config, parts: Parts, batch: PromptBatch) -> tuple[Rollout, RewardTable]:
    judging = Judging(parts.rewards, batch.records, batch.group_ids, frames=config.rollout.judged_frames)
    rollout = collect(
        parts.policy,
        batch,
        steps=config.rollout.steps,
        images_per_call=config.rollout.batch,
        guidance=config.rollout.guidance,
        scheduler=config.rollout.scheduler,
        noise=config.rollout.noise,
        seen=judging.add,
    )
    return rollout, judging.table()


def _note(found: Gathered, batch: PromptBatch, table: RewardTable, signals: Signals) -> None:
    found.tables.append(table)
    found.advantages.append(signals.per_reward)
    found.sources += [record.source for record in batch.records]
    found.groups.append(batch.group_ids + found.prompts)
    found.prompts += len(batch.prompts)
    found.grams.append([])
    found.signal.append(signals.signal)


def _keep_pictures(found: Gathered, rollout: Rollout, table: RewardTable, signals: Signals) -> None:
    """Those on which the rewards disagree most, one a prompt."""
    images, size = rollout.images, rollout.batch.group_size
    best = {picture.prompt: picture for picture in found.pictures}
    for group, record in enumerate(rollout.batch.prompts):
        own = [
            Picture(images[n], record.text, table.scores[n].tolist(), signals.per_reward[n].tolist())
            for n in range(group * size, (group + 1) * size)
        ]
        most = max(own, key=lambda picture: picture.discord)
        known = best.get(record.text)
        if most.discord > 0 and (known is None or most.discord > known.discord):
            best[record.text] = most
    kept = sorted(best.values(), key=lambda picture: -picture.discord)[:SHOWN]
    found.pictures = [replace(picture, pixels=_still(picture.pixels)) for picture in kept]


def _still(image: Tensor) -> Tensor:
    """`[3, H, W]` bytes of an image, of bytes, or of a video's middle frame."""
    still = image[len(image) // 2] if image.ndim == 4 else image
    return still if still.dtype == torch.uint8 else to_bytes(still[None].cpu())[0]


class _Taker:
    """Takes one update's rows; memory that does not suffice halves micro-batches, overflow in float16 the scale."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self.objective, self.parts = config.objective, parts
        parts.engine.scale = parts.updater.scale
        self.most: int | None = None

    def take(self, rollout: Rollout, signals: Signals, plan: Sequence[Visits]) -> tuple[Rows, Tensor]:
        """The rows `[R, P]` of the micro-batches of one update, and their Gram `[R, R]`.

        Raises:
            MarbleError: gradients are not finite.
        """
        engine = self.parts.engine
        while True:
            if self.most is not None:
                plan = [part for visits in plan for part in visits.split(self.most)]
            try:
                rows = self._rows(rollout, signals, plan)
            except RuntimeError as error:
                largest = max(map(len, plan))
                if not is_out_of_memory(error) or largest == 1:
                    raise
                self.most = (largest + 1) // 2
                log.warning("out of memory with %d images in a pass; going on with at most %d", largest, self.most)
                forget(self.parts.policy.device)
                continue
            gram = rows.gram()
            if gram.isfinite().all():
                return rows, gram
            if engine.scale <= 1:
                bad = [r.name for k, r in enumerate(self.parts.rewards) if not gram[k, k].isfinite()]
                raise MarbleError(
                    f"the gradient of {', '.join(bad) or 'the weighted sum'} is not finite on the base model; "
                    "model.dtype: bfloat16 or float32 usually helps"
                )
            engine.scale = max(engine.scale / 4, 1.0)

    def _rows(self, rollout: Rollout, signals: Signals, plan: Sequence[Visits]) -> Rows:
        engine, columns = self.parts.engine, torch.cat([signals.per_reward, signals.weighted_sum[:, None]], dim=1)
        rows, count = engine.rows(columns.shape[1], 1), sum(map(len, plan))
        for visits in plan:
            with engine:
                loss, _ = visit_loss(self.parts.policy, rollout, visits, self.objective)
                slopes = loss.effective(columns[visits.images].to(loss.slope)) / count
                engine.accumulate(rows, loss, slopes, torch.full_like(slopes[:, :1], 1 / count))
        return rows
