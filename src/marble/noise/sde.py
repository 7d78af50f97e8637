"""The schedulers behind `rollout.scheduler: sde`: Diffusers' own, with steps whose log-probabilities are known.

Imports Diffusers, so only `make_scheduler` imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from marble.noise.levels import NoiseLevels, prediction_of
from marble.noise.stochastic import NOISE, Transitions, transitions_of


class _Stochastic:
    """What both have in common.

    Attributes:
        noise: Flow-GRPO's level of it, for flow models.
        transitions: those of the call under way, or of the last.
        taken: if a list, every step adds the latents before it and its log-probability `[N]` (of the last, NaN).
    """

    timesteps: Tensor
    transitions: Transitions
    noise: float = NOISE
    taken: list[tuple[Tensor, Tensor]] | None = None
    _begun: Tensor | None = None  # the timesteps that `transitions` are of
    _next = 0

    def _levels(self) -> tuple[Tensor, Tensor]:
        """`[T + 1]` alphas and sigmas, the last where the last step ends."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Prepare for the timesteps that were set last; every call of a pipeline sets its own."""
        alphas, sigmas = self._levels()
        levels = NoiseLevels(alphas[:-1], sigmas[:-1], self.timesteps, prediction_of(self))
        self.transitions = transitions_of(levels, (alphas[-1].item(), sigmas[-1].item()), self.noise)
        self._begun, self._next = self.timesteps, 0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the next step, in single precision; the answer is of the dtype of `sample`.

        Args:
            model_output: `[N, …]`.
            timestep: not looked at: steps are taken in order.
            sample: `[N, …]`.
            generator: one, or one an image.
            return_dict: as in Diffusers.
        """
        if self._begun is not self.timesteps:
            self._begin()
        step = self.transitions[torch.tensor([self._next])]
        self._next += 1
        mean = step.mean(sample.float(), model_output.float())
        reached, log_prob = mean, mean.new_full((len(mean),), torch.nan)
        if step.std > 0:
            drawn = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            reached = mean + step.std.to(mean) * drawn
        reached = reached.to(sample.dtype)
        if self.taken is not None:
            if self._next < len(self.timesteps):
                log_prob = step.log_prob(reached.float(), mean)
            self.taken.append((sample.cpu(), log_prob.cpu()))
        return SchedulerOutput(prev_sample=reached) if return_dict else (reached,)


class FlowSDE(_Stochastic, FlowMatchEulerDiscreteScheduler):
    """Flow-GRPO's steps."""

    sigmas: Tensor
    config: Any

    def _levels(self) -> tuple[Tensor, Tensor]:
        sigmas = self.sigmas.double().cpu()
        return (sigmas, 1 - sigmas) if self.config.invert_sigmas else (1 - sigmas, sigmas)


class StochasticDDIM(_Stochastic, DDIMScheduler):
    """DDIM with eta = 1, from each of its timesteps to the next."""

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor

    def _levels(self) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.double().cpu()[self.timesteps.cpu()]
        kept = torch.cat([kept, self.final_alpha_cumprod.double().cpu()[None]])
        return kept.sqrt(), (1 - kept).sqrt()
