"""A few seconds of training for models that predict noise, so that what they predict means something.

Clean latents are what is left when the noise is taken out of `x_t`. Of a network with random weights that is its own
error, many times the latents' size at the noisiest levels, and no reward can be traced through it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from marble import Policy

STEPS, BATCH = 100, 32


def settle(folder: Path, call: dict) -> None:
    """Train the pipeline's denoiser to find noise in patches of one colour with some grain; saved in place."""
    policy = Policy.from_pretrained(str(folder), call=call, device="cpu")
    texts = ["a cat", "two dogs here", "a house", "a boat"]
    samples = policy.sample(texts, list(range(BATCH)), steps=8)
    conditioning, shape = samples.conditioning.expanded(), samples.x0.shape[1:]
    trained = list(policy.denoiser.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(BATCH, *size, generator=generator)

    for _ in range(STEPS):
        x0 = 0.7 * random(shape[0], *[1] * (len(shape) - 1)) + 0.3 * random(*shape)
        noise, steps = random(*shape), torch.randint(0, len(samples.levels), (BATCH,), generator=generator)
        levels = samples.levels[steps]
        found = conditioning.call(policy.denoiser, levels.noised(x0, noise), levels.timesteps)
        (found - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.denoiser.requires_grad_(False)
    policy.pipe.save_pretrained(folder)
