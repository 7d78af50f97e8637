"""Noise levels and what a network's output says about the clean latents, for any scheduler of Diffusers.

Everything is in the space of what the denoiser is given: `x_t = alpha x0 + sigma noise`. The pair (alpha, sigma) of
a step is asked of the scheduler itself, by noising a one and a zero, so that no scheduler has to be known by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marble.catalogue import SCHEDULERS
from marble.errors import MarbleError

PREDICTIONS = ("flow_prediction", "epsilon", "v_prediction", "sample")
"""What a denoiser may predict: `noise − x0`, the noise, `alpha noise − sigma x0`, or `x0` itself."""

FLOWS = ("flow_prediction", "reversed_flow_prediction")  # the latter: `x0 − noise`, where a scheduler inverts sigmas

_TOLERANCE = 2e-3  # of alpha + sigma = 1 or alpha² + sigma² = 1: some schedulers keep their table in single precision


@dataclass(frozen=True)
class NoiseLevels:
    """T steps of a sampler, or the levels of M noised latents."""

    alphas: Tensor  # [T] of the clean latents
    sigmas: Tensor  # [T] of the noise
    timesteps: Tensor  # [T] what the denoiser is told
    prediction: str  # one of PREDICTIONS, or `reversed_flow_prediction`

    def __len__(self) -> int:
        return len(self.sigmas)

    def __getitem__(self, steps: Tensor) -> NoiseLevels:
        """The levels at some of the steps."""
        return NoiseLevels(self.alphas[steps], self.sigmas[steps], self.timesteps[steps], self.prediction)

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """`alpha x0 + sigma noise`, `[M, …]` each."""
        return over(self.alphas, x0) * x0 + over(self.sigmas, x0) * noise

    def clean(self, x_t: Tensor, output: Tensor) -> Tensor:
        """The clean latents `[M, …]` that the denoiser's `output` at `x_t` stands for; affine in `output`."""
        alpha, sigma = over(self.alphas, x_t), over(self.sigmas, x_t)
        if self.prediction == "flow_prediction":
            return x_t - sigma * output
        if self.prediction == "reversed_flow_prediction":
            return x_t + sigma * output
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        if self.prediction == "v_prediction":
            return alpha * x_t - sigma * output
        return output

    @property
    def gains(self) -> Tensor:
        """`[T]`: how far the clean latents move when the denoiser's output moves by one."""
        if self.prediction == "sample":
            return torch.ones_like(self.sigmas)
        return self.sigmas / self.alphas if self.prediction == "epsilon" else self.sigmas

    @property
    def weights(self) -> Tensor:
        """`[T]`: what losses on clean latents are multiplied by, so that the output is pulled as a flow model's is.

        A flow model's clean latents move by sigma with its output; so do those of a model that predicts v. Predicted
        noise moves them by sigma / alpha, 14 times as far at the noisiest level of Stable Diffusion and 156 times at
        PixArt's. `sigma / gains`: 1 for the former two.
        """
        return self.sigmas / self.gains


def levels_of(scheduler: Any, steps: Tensor, told: Tensor) -> NoiseLevels:
    """The levels that a scheduler visited.

    Args:
        scheduler: after a run of its pipeline.
        steps: `[T]` its own timesteps.
        told: `[T]` what the denoiser was told.

    Raises:
        MarbleError: it is of no kind that training knows how to noise for.
    """
    prediction = prediction_of(scheduler)
    one, zero = torch.ones(1), torch.zeros(1)
    try:
        alphas = torch.cat([_noise_with(scheduler, one, zero, step) for step in steps])
        sigmas = torch.cat([_noise_with(scheduler, zero, one, step) for step in steps])
    except (AttributeError, TypeError, NotImplementedError, IndexError) as error:
        raise MarbleError(
            f"{type(scheduler).__name__} cannot be trained with: it does not say how it noises ({error}); choose "
            f"another with rollout.scheduler: {', '.join(n for n in SCHEDULERS if n != 'own')}"
        ) from error
    if prediction == "reversed_flow_prediction":  # its sigmas are of the clean latents
        alphas, sigmas = sigmas, alphas
    total = alphas + sigmas if prediction in FLOWS else alphas.square() + sigmas.square()
    if not ((total - 1).abs() < _TOLERANCE).all():
        law = "alpha + sigma" if prediction in FLOWS else "alpha² + sigma²"
        raise MarbleError(
            f"{type(scheduler).__name__} cannot be trained with: with prediction_type {prediction} every {law} must be "
            f"1 where the denoiser is called, saw {total.min():.3f} to {total.max():.3f}; choose another with "
            f"rollout.scheduler: {', '.join(n for n in SCHEDULERS if n != 'own')}"
        )
    if prediction == "epsilon" and not (alphas > 0).all():
        raise MarbleError(
            f"{type(scheduler).__name__} cannot be trained with: at a level of pure noise (zero terminal SNR) a "
            "predicted noise says nothing of the clean latents; the model should predict v"
        )
    if sigmas[0] < sigmas[-1]:
        raise MarbleError(
            f"{type(scheduler).__name__} cannot be trained with: noise should fall from step to step, it grows from "
            f"{sigmas[0]:.3f} to {sigmas[-1]:.3f}"
        )
    return NoiseLevels(alphas, sigmas, told, prediction)


def prediction_of(scheduler: Any) -> str:
    """What the denoiser of a scheduler predicts, one of `PREDICTIONS` or `reversed_flow_prediction`.

    Raises:
        MarbleError: the scheduler does not say.
    """
    if hasattr(scheduler, "scale_noise") and not scheduler.config.get("prediction_type"):  # flow matching
        return "reversed_flow_prediction" if scheduler.config.get("invert_sigmas") else "flow_prediction"
    prediction = scheduler.config.get("prediction_type")
    if prediction not in PREDICTIONS:
        raise MarbleError(
            f"{type(scheduler).__name__} says that the model predicts {prediction!r}; known: {', '.join(PREDICTIONS)}"
        )
    return prediction


def _noise_with(scheduler: Any, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """What the denoiser would be given at `step`: noised, and scaled as it is scaled for it. All `[1]`."""
    scheduler = copy.copy(scheduler)
    scheduler._begin_index = scheduler._step_index = None  # or it answers for where it stopped
    step = step[None].to(scheduler.timesteps.device)
    if hasattr(scheduler, "scale_noise"):  # flow matching; its scale_model_input, if any, changes nothing
        return scheduler.scale_noise(x0.to(step.device), step, noise.to(step.device)).float().cpu()
    noised = scheduler.add_noise(x0.to(step.device), noise.to(step.device), step)
    return scheduler.scale_model_input(noised, step[0]).float().cpu()


def over(values: Tensor, like: Tensor) -> Tensor:
    """A number an image `[M]`, shaped to be multiplied with `like [M, …]`."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
