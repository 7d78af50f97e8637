"""Where losses are taken: which image at which timestep in which update, and the loss there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marble.config import Objective
from marble.noise import NoiseLevels, Trajectory
from marble.objectives.affine import AffineLoss
from marble.objectives.awm import awm_loss
from marble.objectives.nft import nft_loss
from marble.objectives.ppo import ppo_loss
from marble.policy import Policy, Prediction
from marble.rollout import Rollout
from marble.seeds import derive, generator
from marble.watch import Conditioning, first_broken


@dataclass(frozen=True)
class Visits:
    """Images visited in one micro-batch, each at one step of the sampler's grid."""

    images: Tensor  # [M] int64, indices into the images at hand
    steps: Tensor  # [M] int64, indices into the sampler's T steps
    noise_seeds: tuple[int, ...]  # [M], so that an image's noise does not depend on its neighbours; not for ppo
    idle: Tensor | None = None  # [M] bool: those that count for nothing, and keep step with other processes
    shares: Tensor | None = None  # [M] float: for how many of the even visits each stands; 1, if not given

    def __len__(self) -> int:
        return len(self.images)

    @property
    def counts(self) -> Tensor:
        """`[M]` float: 1, or 0 for those that are idle."""
        return torch.ones(len(self)) if self.idle is None else (~self.idle).float()

    @property
    def weights(self) -> Tensor:
        """`[M]` float: what each visit's loss is multiplied by, before it is divided by the update's visits."""
        return self.counts if self.shares is None else self.counts * self.shares

    def split(self, most: int) -> list[Visits]:
        """The same visits in parts of at most `most`."""
        return [
            Visits(
                self.images[at : at + most],
                self.steps[at : at + most],
                self.noise_seeds[at : at + most],
                None if self.idle is None else self.idle[at : at + most],
                None if self.shares is None else self.shares[at : at + most],
            )
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
    in_step: Sequence[range] = (),
    expected: Tensor | None = None,
) -> list[list[Visits]]:
    """Spread an epoch's visits over its updates.

    Every image is visited at `timesteps` different steps of the sampler's grid, the last step left out; in
    each pass over the images every image is at another one of its own shuffled order. With `expected` it is visited as
    often as that says, to the next whole number, and every visit counts for so much that nothing changes on average.

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
        in_step: every process's `own`, if all have to make as many micro-batches of the same sizes: those with fewer
            visits repeat some that then count for nothing. If any has `tables` of several, `micro_batch` must be 1.
        expected: `[N, T − 1]`, how often each image is visited at each step, of sum `N · timesteps`
            (`expected_visits`).

    Returns:
        Micro-batches for each update; `images` counts from `own.start`.
    """
    shares = None
    if expected is None:
        order = torch.rand(count, grid - 1, generator=generator(seed, "timesteps", epoch)).argsort(dim=1)[:, :timesteps]
        orders = [torch.randperm(count, generator=generator(seed, "order", epoch, p)) for p in range(timesteps)]
        images, passes = torch.cat(orders), torch.arange(timesteps).repeat_interleave(count)
        steps = order[images, passes]
    else:
        images, steps, passes = _drawn(expected, count * timesteps, generator(seed, "visits", epoch))
        shares = (timesteps / (grid - 1) / expected[images, steps]).float()
    own = range(count) if own is None else own
    plan: list[list[Visits]] = []
    parts = torch.arange(len(images)).tensor_split(updates)
    spare = _of(torch.arange(len(images)), images, own)[:1]  # repeated to keep step
    if in_step and len(own) and not len(spare):  # none of this process's images is visited: one beyond all parts
        spare = torch.tensor([len(images)])
        images, steps, passes = (
            torch.cat([each, torch.tensor([one])]) for each, one in ((images, own.start), (steps, 0), (passes, 0))
        )
        shares = None if shares is None else torch.cat([shares, torch.ones(1)])
    for part in parts:
        mine = _of(part, images, own)
        plan.append([])
        wanted = max((len(_of(part, images, other)) for other in in_step), default=0)
        idle = torch.arange(max(len(mine), wanted)) >= len(mine)
        mine = torch.cat([mine, spare.expand(int(idle.sum()))])
        for at in _split(len(mine), micro_batch, None if tables is None else tables[images[mine] - own.start]):
            chosen = mine[at]
            which = zip(images[chosen].tolist(), passes[chosen].tolist(), strict=True)
            seeds = tuple(derive(seed, "noise", epoch, image, p) for image, p in which)
            spared = idle[at] if in_step else None
            each = None if shares is None else shares[chosen]
            plan[-1].append(Visits(images[chosen] - own.start, steps[chosen], seeds, spared, each))
    return plan


def _drawn(expected: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Systematic sampling: `count` visits, each number the expected one rounded down or up, an image's far apart.

    Returns:
        Images, steps, and which of its image's visits each is, `[count]`, in the order of the epoch.
    """
    mixed = torch.randperm(expected.numel(), generator=rng)
    ends = expected.double().flatten()[mixed].cumsum(0)
    ends = (ends * (count / ends[-1]) + torch.rand(1, generator=rng).item()).floor().long()
    numbers = torch.empty_like(ends)
    numbers[mixed] = ends.diff(prepend=ends.new_zeros(1))
    pairs = torch.arange(expected.numel()).repeat_interleave(numbers)
    pairs = pairs[torch.randperm(len(pairs), generator=rng)]
    images, steps = pairs // expected.shape[1], pairs % expected.shape[1]
    of_image, by_image = images.bincount(minlength=len(expected)), images.argsort(stable=True)
    passes = torch.empty_like(images)
    passes[by_image] = torch.arange(len(images)) - (of_image.cumsum(0) - of_image)[images[by_image]]
    begins = torch.rand(len(expected), generator=rng)
    order = ((passes + begins[images]) / of_image[images]).argsort()
    return images[order], steps[order], passes[order]


def _of(visits: Tensor, images: Tensor, own: range) -> Tensor:
    """Those of the visits whose images are one process's."""
    return visits[(images[visits] >= own.start) & (images[visits] < own.stop)]


def _split(count: int, most: int, tables: Tensor | None) -> list[Tensor]:
    """Numbers from 0 in order, in parts of at most `most`, and of one table each."""
    numbers = torch.arange(count)
    if tables is None:
        return list(numbers.split(most)) if count else []  # of nothing, `split` makes one empty part
    return [part for table in tables.unique() for part in numbers[tables == table].split(most)]


def visit_loss(
    policy: Policy, rollout: Rollout, visits: Visits, settings: Objective
) -> tuple[AffineLoss, Tensor | None]:
    """The loss at the visits.

    `ppo` takes it at the steps that the sampler took, on their log-probabilities; the others noise the visited images
    afresh and take it there, on the clean latents that the outputs stand for.

    Returns:
        The affine loss `[M]` (for `nft`, times `NoiseLevels.weights`: 1 for flow models), and the distance to the base
        model `[M]` of every visit, None if its weight is 0: `Transitions.divergence` for `ppo`, for the others
        `mean (v_theta − v_ref)²`.
    """
    if settings.name == "ppo":
        return _at_steps(policy, rollout, visits, settings)
    x0, at = _noised(rollout, visits)
    levels = at[1]
    with torch.no_grad():
        old = policy.predict(*at, adapter="old")
        reference = policy.predict(*at, adapter=None) if settings.kl else None
    theta = policy.predict(*at, adapter="default")
    loss = _loss(x0, theta, old, levels, settings)
    if reference is None:
        return loss, None
    return loss, (theta.output - reference.output).square().flatten(1).mean(dim=1)


def _at_steps(
    policy: Policy, rollout: Rollout, visits: Visits, settings: Objective
) -> tuple[AffineLoss, Tensor | None]:
    """`visit_loss` of `ppo`: how likely the trained policy finds the steps that were taken."""
    trajectory = _trajectory(rollout)
    at = _before(rollout, visits)
    reference = None
    if settings.kl:
        with torch.no_grad():
            reference = policy.predict(*at, adapter=None)
    theta = policy.predict(*at, adapter="default")
    x, steps = at[0], trajectory.steps[visits.steps]
    mean = steps.mean(x, theta.output)
    log_prob = steps.log_prob(trajectory.latents[visits.images, visits.steps + 1].to(x), mean)
    old = trajectory.log_probs[visits.images, visits.steps].to(x)
    loss = ppo_loss(log_prob, old, clip=settings.clip, amax=settings.amax)
    return loss, None if reference is None else steps.divergence(mean, steps.mean(x, reference.output))


def where_broken(policy: Policy, rollout: Rollout, visits: Visits, settings: Objective) -> str:
    """Where a loss that is not finite comes from."""
    at = _before(rollout, visits) if settings.name == "ppo" else _noised(rollout, visits)[1]
    for adapter in ("default", "old", None):
        layer = first_broken(policy.denoiser, functools.partial(policy.predict, *at, adapter=adapter))
        if layer is not None:
            return f"first in what layer {layer} answers, with the {adapter or 'base'} weights"
    return "in the loss itself; every layer's answer is finite"


def _noised(rollout: Rollout, visits: Visits) -> tuple[Tensor, tuple[Tensor, NoiseLevels, Conditioning]]:
    """The visited images' clean latents, and where the denoiser is called: noised latents, levels, conditioning."""
    samples = rollout.samples
    x0, levels = samples.x0[visits.images.to(samples.x0.device)], samples.levels[visits.steps]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=_seeded(seed)) for seed in visits.noise_seeds]).to(x0)
    return x0, (levels.noised(x0, noise), levels, samples.conditioning[visits.images].expanded())


def _before(rollout: Rollout, visits: Visits) -> tuple[Tensor, NoiseLevels, Conditioning]:
    """Where the denoiser was called before the visited steps: latents, levels, conditioning."""
    samples = rollout.samples
    latents = _trajectory(rollout).latents[visits.images, visits.steps].to(samples.x0)
    return latents, samples.levels[visits.steps], samples.conditioning[visits.images].expanded()


def _trajectory(rollout: Rollout) -> Trajectory:
    trajectory = rollout.samples.trajectory
    if trajectory is None:
        raise ValueError("ppo needs images sampled with scheduler sde: only there are log-probabilities known")
    return trajectory


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
