"""Where losses are taken: which image at which timestep in which update, and the loss there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble.config import Objective
from marble.objectives.affine import AffineLoss
from marble.objectives.nft import nft_loss
from marble.policy import Policy
from marble.rollout import Rollout
from marble.seeds import derive, generator


@dataclass(frozen=True)
class Visits:
    """Images visited in one micro-batch, each at one step of the sampler's grid."""

    images: Tensor  # [M] int64, indices into the epoch's N images
    steps: Tensor  # [M] int64, indices into the sampler's T steps
    noise_seed: int

    def __len__(self) -> int:
        return len(self.images)


def plan_epoch(
    count: int, grid: int, *, timesteps: int, updates: int, micro_batch: int, seed: int, epoch: int
) -> list[list[Visits]]:
    """Spread an epoch's visits over its updates.

    Every image is visited at `timesteps` different steps of the sampler's grid, the last step left out; in
    each pass over the images every image is at another one of its own shuffled order.

    Args:
        count: N images.
        grid: T steps of the sampler.
        timesteps: visits per image, at most T − 1.
        updates: parts as equal as they can be, at most N · timesteps.
        micro_batch: most images in one forward.
        seed: of the run.
        epoch: which epoch.

    Returns:
        Micro-batches for each update.
    """
    order = torch.rand(count, grid - 1, generator=generator(seed, "timesteps", epoch)).argsort(dim=1)[:, :timesteps]
    steps = order.T.flatten()  # pass after pass
    passes = [torch.randperm(count, generator=generator(seed, "order", epoch, p)) for p in range(timesteps)]
    images = torch.cat(passes)
    steps = torch.cat([steps[p * count :][:count][chosen] for p, chosen in enumerate(passes)])
    plan = []
    for u, (part, at) in enumerate(zip(images.tensor_split(updates), steps.tensor_split(updates), strict=True)):
        pieces = zip(part.split(micro_batch), at.split(micro_batch), strict=True)
        plan.append([Visits(i, s, derive(seed, "noise", epoch, u, m)) for m, (i, s) in enumerate(pieces)])
    return plan


def visit_loss(
    policy: Policy, rollout: Rollout, visits: Visits, settings: Objective
) -> tuple[AffineLoss, Tensor | None]:
    """Noise the visited images afresh and take the loss there.

    Returns:
        The affine loss `[M]`, and `mean (v_theta − v_ref)²` over the visits, None if its weight is 0.
    """
    samples = rollout.samples
    x0, sigma = samples.x0[visits.images], samples.sigmas[visits.steps]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(visits.noise_seed)).to(x0)
    x_t = policy.noised(x0, noise, sigma)
    at = (x_t, sigma, samples.timesteps[visits.steps], samples.conditioning[visits.images])
    with torch.no_grad():
        old = policy.predict(*at, adapter="old")
        reference = policy.predict(*at, adapter=None) if settings.kl else None
    theta = policy.predict(*at, adapter="default")
    loss = nft_loss(x0, theta.x0, old.x0, beta=settings.beta, amax=settings.amax)
    return loss, None if reference is None else (theta.output - reference.output).square().mean()
