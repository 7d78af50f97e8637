"""Steps of a sampler that draws noise, and how likely the step that was taken was.

Every step is `x' = keep · x + gain · output + std · noise`, in the latents `x` and in what the denoiser answers.
Flow-GRPO's for flow models (arXiv 2505.05470, yifan123/flow_grpo; sigma falls from 1 to 0, `dt < 0`, `v = noise − x0`):

    s = noise · sqrt(sigma / (1 − sigma)),  std = s sqrt(−dt)
    mean = x (1 + s² dt / (2 sigma)) + v (1 + s² (1 − sigma) / (2 sigma)) dt

and DDIM's with eta = 1 for all others (arXiv 2010.02502; DDPO's, arXiv 2305.13301), primes for the next level:

    std² = (1 − alpha'²) / (1 − alpha²) · (1 − alpha² / alpha'²),  mean = alpha' x0 + sqrt(1 − alpha'² − std²) noise

Both keep the distribution of every level what it is without noise. Log-probabilities are averaged over dimensions, as
in both papers' code. Ours: a flow's last step, which is not trained, is Euler's. With noise in it, an image of a model
whose last level is far from 0 (FLUX: over 0.1) stays noisy; SD3's last level is 0.009, where it hardly shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marble.noise.levels import FLOWS, NoiseLevels, over

NOISE = 0.7
"""Flow-GRPO's level of the noise between a flow model's steps."""


@dataclass(frozen=True)
class Transitions:
    """T steps of a sampler, or those of M latents."""

    keep: Tensor  # [T] of the latents
    gain: Tensor  # [T] of the denoiser's output
    std: Tensor  # [T] of the noise; 0 where a step draws none
    unit: Tensor  # [T] that the divergence is measured in: s of a flow, otherwise `std`

    def __getitem__(self, steps: Tensor) -> Transitions:
        """Some of the steps."""
        return Transitions(self.keep[steps], self.gain[steps], self.std[steps], self.unit[steps])

    def mean(self, x: Tensor, output: Tensor) -> Tensor:
        """`[M, …]`: where the steps lead on average."""
        return over(self.keep, x) * x + over(self.gain, x) * output

    def log_prob(self, x_next: Tensor, mean: Tensor) -> Tensor:
        """`[M]`: logarithm of the density at `x_next [M, …]`, averaged over dimensions. Every `std` must be > 0."""
        std = self.std.to(mean)
        error = (x_next - mean).square().flatten(1).mean(dim=1)
        return -error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)

    def divergence(self, mean: Tensor, reference: Tensor) -> Tensor:
        """`[M]`: `mean (mean − reference)² / (2 unit²)`.

        For a flow it is what Flow-GRPO's code penalises, `−dt` times the divergence of the two steps' distributions
        (a dimension's); otherwise it is that divergence.
        """
        return (mean - reference).square().flatten(1).mean(dim=1) / (2 * self.unit.to(mean) ** 2)


def transitions_of(levels: NoiseLevels, last: tuple[float, float], noise: float = NOISE) -> Transitions:
    """The steps from each level to the next.

    Args:
        levels: where the denoiser is called, T of them.
        last: alpha and sigma where the last step ends.
        noise: Flow-GRPO's `a`, for flow models; > 0.
    """
    alphas = torch.cat([levels.alphas.double().cpu(), torch.tensor(last[:1], dtype=torch.float64)])
    sigmas = torch.cat([levels.sigmas.double().cpu(), torch.tensor(last[1:], dtype=torch.float64)])
    alpha, sigma = alphas[:-1], sigmas[:-1]
    here = NoiseLevels(alpha, sigma, levels.timesteps, levels.prediction)
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    clean = here.clean(one, zero), here.clean(zero, one)  # x0 = clean[0] x + clean[1] output
    if levels.prediction in FLOWS:
        dt = sigmas[1:] - sigma
        apart = 1 - sigma
        apart[0] = torch.maximum(apart[0], -dt[0])  # at sigma = 1 it is that of the next level
        s = noise * (sigma / apart).sqrt()
        s[-1] = 0
        velocity = -clean[1] / sigma  # 1, or −1 of a reversed flow: v is `velocity` times the output
        keep, gain = 1 + s**2 * dt / (2 * sigma), velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        std, unit = s * (-dt).sqrt(), s
    else:
        alpha_next = alphas[1:]
        std = ((1 - alpha_next**2) / (1 - alpha**2) * (1 - (alpha / alpha_next) ** 2)).clamp_min(0).sqrt()
        rest = (1 - alpha_next**2 - std**2).clamp_min(0).sqrt()
        drawn = (1 - alpha * clean[0]) / sigma, -alpha * clean[1] / sigma  # the noise that x is taken to hold
        keep, gain = alpha_next * clean[0] + rest * drawn[0], alpha_next * clean[1] + rest * drawn[1]
        unit = std
    return Transitions(keep.float(), gain.float(), std.float(), unit.float())


@dataclass(frozen=True)
class Trajectory:
    """How N images came about, on the CPU; kept where an objective asks how likely their steps are."""

    latents: Tensor  # [N, T, …] before every step, as the denoiser was given them
    log_probs: Tensor  # [N, T − 1] float32, of every step but the last, under the policy that took it
    steps: Transitions  # the sampler's T

    @classmethod
    def of_steps(cls, taken: Sequence[tuple[Tensor, Tensor]], steps: Transitions) -> Trajectory:
        """Of one call's steps: the latents before each, and its log-probability."""
        latents, log_probs = zip(*taken, strict=True)
        return cls(torch.stack(latents, dim=1), torch.stack(log_probs[:-1], dim=1), steps)

    @classmethod
    def join(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Of several calls of one pipeline, in order."""
        latents = torch.cat([part.latents for part in parts])
        return cls(latents, torch.cat([part.log_probs for part in parts]), parts[0].steps)

    def __getitem__(self, images: Tensor) -> Trajectory:
        """Of some of the images."""
        return Trajectory(self.latents[images], self.log_probs[images], self.steps)
