"""One epoch's images, sampled by the old policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marble.policy import Policy, Samples
from marble.prompts import PromptBatch


@dataclass(frozen=True)
class Rollout:
    """The images of one `PromptBatch` with everything that training needs of them."""

    batch: PromptBatch
    samples: Samples
    offset: int = 0  # of the first image among those of all processes

    @property
    def x0(self) -> Tensor:
        """`[N, …]` clean latents."""
        return self.samples.x0

    @property
    def images(self) -> Tensor:
        """`[N, 3, H, W]` float in [0, 1]; `[N, F, 3, H, W]` of videos."""
        return self.samples.images


def collect(
    policy: Policy,
    batch: PromptBatch,
    *,
    steps: int,
    images_per_call: int,
    adapter: str = "old",
    guidance: float = 1.0,
    scheduler: str = "own",
    offset: int = 0,
    prompts: int = 0,
) -> Rollout:
    """Sample every image of `batch`: the same seeds and weights give the same images.

    If processes have to keep step, and one of them has `prompts`, some are sampled twice, and left out.
    """
    spare = max(0, prompts - len(batch.prompts)) if policy.in_step else 0
    samples = policy.sample(
        [record.text for record in batch.prompts] + [batch.prompts[0].text] * spare,
        batch.seeds + batch.seeds[: batch.group_size] * spare,
        steps=steps,
        adapter=adapter,
        guidance=guidance,
        scheduler=scheduler,
        batch=images_per_call,
    )
    if spare:
        own = torch.arange(len(batch.seeds))
        x0, images, conditioning = samples.x0[own], samples.images[own], samples.conditioning[own]
        samples = replace(samples, x0=x0, images=images, conditioning=conditioning)
    return Rollout(batch, samples, offset)
