"""One epoch's images, sampled by the old policy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.noise import NOISE
from marble.policy import Policy, Samples
from marble.policy.sampling import check_pictures
from marble.prompts import PromptBatch
from marble.watch import first_broken


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
    noise: float = NOISE,
    offset: int = 0,
    prompts: int = 0,
    seen: Callable[[Tensor], object] = lambda images: None,
) -> Rollout:
    """Sample every image of `batch`: the same seeds and weights give the same images.

    If processes have to keep step, and one of them has `prompts`, some are sampled twice, and left out. `seen` is given
    images as soon as they are made, those left out at the end included.

    Raises:
        MarbleError: latents are not finite; names the layer.
    """
    spare = max(0, prompts - len(batch.prompts)) if policy.in_step else 0
    samples = policy.sample(
        [record.text for record in batch.prompts] + [batch.prompts[0].text] * spare,
        batch.seeds + batch.seeds[: batch.group_size] * spare,
        steps=steps,
        adapter=adapter,
        guidance=guidance,
        scheduler=scheduler,
        noise=noise,
        batch=images_per_call,
        seen=seen,
    )
    broken = ~samples.x0.flatten(1).isfinite().all(dim=1)
    if broken.any():
        raise MarbleError(_blame(policy, samples, broken.nonzero().flatten()[:1].cpu(), adapter))
    check_pictures(samples.images)
    if spare:
        samples = samples[torch.arange(len(batch.seeds))]
    return Rollout(batch, samples, offset)


def _blame(policy: Policy, samples: Samples, one: Tensor, adapter: str) -> str:
    """Where the latents of `one` image stopped being finite, and what to do."""
    where = _where_broken(policy, samples, one, adapter)
    remedy = "model.dtype: bfloat16 or float32" if policy.denoiser.dtype == torch.float16 else "a lower optimizer.lr"
    return (
        f"sampled latents are not finite: {where} stops being so; what was learned before is "
        f"kept; {remedy} usually helps"
    )


def _where_broken(policy: Policy, samples: Samples, one: Tensor, adapter: str) -> str:
    """The texts, or the first layer that spoils plain noise at any level of the sampler."""
    conditioning = samples.conditioning[one]
    texts = conditioning.expanded().tables[0].per_prompt.values()
    if not all(value.isfinite().all() for value in texts if isinstance(value, Tensor)):
        return "what the text encoders answer"
    noise = torch.randn(1, *samples.x0.shape[1:], generator=torch.Generator().manual_seed(0)).to(samples.x0)
    for step in range(len(samples.levels)):
        at = (noise, samples.levels[torch.tensor([step])], conditioning)
        layer = first_broken(policy.denoiser, functools.partial(policy.predict, *at, adapter=adapter))
        if layer is not None:
            return f"layer {layer} of {policy.part}"
    return "the sampler"
