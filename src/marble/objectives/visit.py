"""Where losses are taken: which image at which timestep in which update, and the loss there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marble.config import Objective
from marble.noise import NoiseLevels
from marble.objectives.affine import AffineLoss
from marble.objectives.awm import awm_loss
from marble.objectives.nft import nft_loss
from marble.policy import Policy, Prediction
from marble.rollout import Rollout
from marble.seeds import derive, generator


@dataclass(frozen=True)
class Visits:
    """Images visited in one micro-batch, each at one step of the sampler's grid."""

    images: Tensor  # [M] int64, indices into the images at hand
    steps: Tensor  # [M] int64, indices into the sampler's T steps
    noise_seeds: tuple[int, ...]  # [M], so that an image's noise does not depend on its neighbours

    def __len__(self) -> int:
        return len(self.images)

    def split(self, most: int) -> list[Visits]:
        """The same visits in parts of at most `most`."""
        return [
            Visits(self.images[at : at + most], self.steps[at : at + most], self.noise_seeds[at : at + most])
            for at in range(0, len(self), most)
        ]


def plan_epoch(
    count: int,
    grid: int,
    *,
    timesteps: int,
    updates: int,
    micro_batch: int,
    seed: int,
    epoch: int,
    own: range | None = None,
    tables: Tensor | None = None,
) -> list[list[Visits]]:
    """Spread an epoch's visits over its updates.

    Every image is visited at `timesteps` different steps of the sampler's grid, the last step left out; in
    each pass over the images every image is at another one of its own shuffled order.

    Args:
        count: N images, over all processes.
        grid: T steps of the sampler.
        timesteps: visits per image, at most T − 1.
        updates: parts as equal as they can be, at most N · timesteps.
        micro_batch: most images in one forward.
        seed: of the run.
        epoch: which epoch.
        own: which of the N images this process holds; all, if not given. The plans of all processes together are
            the plan of one.
        tables: `[len(own)]`, images of different numbers cannot be in one micro-batch (`Conditioning.table_of`).

    Returns:
        Micro-batches for each update; `images` counts from `own.start`.
    """
    order = torch.rand(count, grid - 1, generator=generator(seed, "timesteps", epoch)).argsort(dim=1)[:, :timesteps]
    images = torch.cat([torch.randperm(count, generator=generator(seed, "order", epoch, p)) for p in range(timesteps)])
    passes = torch.arange(timesteps).repeat_interleave(count)
    steps = order[images, passes]
    own = range(count) if own is None else own
    plan: list[list[Visits]] = []
    for part in torch.arange(len(images)).tensor_split(updates):
        mine = part[(images[part] >= own.start) & (images[part] < own.stop)]
        plan.append([])
        for chosen in _split(mine, micro_batch, None if tables is None else tables[images[mine] - own.start]):
            at = zip(images[chosen].tolist(), passes[chosen].tolist(), strict=True)
            seeds = tuple(derive(seed, "noise", epoch, image, p) for image, p in at)
            plan[-1].append(Visits(images[chosen] - own.start, steps[chosen], seeds))
    return plan


def _split(visits: Tensor, most: int, tables: Tensor | None) -> list[Tensor]:
    """In order, in parts of at most `most`, and of one table each."""
    if tables is None:
        return list(visits.split(most)) if len(visits) else []  # of nothing, `split` makes one empty part
    return [part for table in tables.unique() for part in visits[tables == table].split(most)]


def visit_loss(
    policy: Policy, rollout: Rollout, visits: Visits, settings: Objective
) -> tuple[AffineLoss, Tensor | None]:
    """Noise the visited images afresh and take the loss there, on the clean latents that the outputs stand for.

    Returns:
        The affine loss `[M]` (for `nft`, times `NoiseLevels.weights`: 1 for flow models), and
        `mean (v_theta − v_ref)²` `[M]` of every visit, None if its weight is 0.
    """
    samples = rollout.samples
    x0, levels = samples.x0[visits.images.to(samples.x0.device)], samples.levels[visits.steps]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=_seeded(seed)) for seed in visits.noise_seeds]).to(x0)
    at = (levels.noised(x0, noise), levels, samples.conditioning[visits.images].expanded())
    with torch.no_grad():
        old = policy.predict(*at, adapter="old")
        reference = policy.predict(*at, adapter=None) if settings.kl else None
    theta = policy.predict(*at, adapter="default")
    loss = _loss(x0, theta, old, levels, settings)
    if reference is None:
        return loss, None
    return loss, (theta.output - reference.output).square().flatten(1).mean(dim=1)


def _loss(x0: Tensor, theta: Prediction, old: Prediction, levels: NoiseLevels, settings: Objective) -> AffineLoss:
    if settings.name == "awm":
        weight = levels.gains.to(x0) ** -2  # errors of the network's own output: a velocity's, a noise's
        clip, pull, amax = settings.clip, settings.pull, settings.amax
        return awm_loss(x0, theta.x0, old.x0, clip=clip, pull=pull, amax=amax, weight=weight)
    loss = nft_loss(x0, theta.x0, old.x0, beta=settings.beta, amax=settings.amax)
    weight = levels.weights.to(x0)
    return replace(loss, const=weight * loss.const, slope=weight * loss.slope)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
