"""Where losses are taken: which image at which timestep in which update, and the loss there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble.config import Objective
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
        for chosen in mine.split(micro_batch) if len(mine) else ():  # of nothing, `split` makes one empty part
            at = zip(images[chosen].tolist(), passes[chosen].tolist(), strict=True)
            seeds = tuple(derive(seed, "noise", epoch, image, p) for image, p in at)
            plan[-1].append(Visits(images[chosen] - own.start, steps[chosen], seeds))
    return plan


def visit_loss(
    policy: Policy, rollout: Rollout, visits: Visits, settings: Objective
) -> tuple[AffineLoss, Tensor | None]:
    """Noise the visited images afresh and take the loss there.

    Returns:
        The affine loss `[M]`, and `mean (v_theta − v_ref)²` `[M]` of every visit, None if its weight is 0.
    """
    samples = rollout.samples
    x0, sigma = samples.x0[visits.images], samples.sigmas[visits.steps]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=_seeded(seed)) for seed in visits.noise_seeds]).to(x0)
    x_t = policy.noised(x0, noise, sigma)
    at = (x_t, sigma, samples.timesteps[visits.steps], samples.conditioning[visits.images].expanded())
    with torch.no_grad():
        old = policy.predict(*at, adapter="old")
        reference = policy.predict(*at, adapter=None) if settings.kl else None
    theta = policy.predict(*at, adapter="default")
    loss = _loss(x0, theta, old, sigma, settings)
    if reference is None:
        return loss, None
    return loss, (theta.output - reference.output).square().flatten(1).mean(dim=1)


def _loss(x0: Tensor, theta: Prediction, old: Prediction, sigma: Tensor, settings: Objective) -> AffineLoss:
    if settings.name == "awm":
        weight = sigma.to(x0) ** -2  # the velocity's error is that of the clean prediction over sigma
        clip, pull, amax = settings.clip, settings.pull, settings.amax
        return awm_loss(x0, theta.x0, old.x0, clip=clip, pull=pull, amax=amax, weight=weight)
    return nft_loss(x0, theta.x0, old.x0, beta=settings.beta, amax=settings.amax)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
