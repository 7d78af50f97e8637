"""How a pipeline calls its denoiser, once that has been learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from marble.watch.tree import KEEP, Path, rebuild


@dataclass(frozen=True)
class Manner:
    """Which arguments are the latents and the timestep, which differ from image to image, what to do to the output.

    Learnt by `learn` and good for every call of the same pipeline, whatever its scheduler, size and prompts.
    """

    latent: str  # the argument's name
    listed: bool  # latents go in as a list of one tensor an image
    ones: tuple[int, ...]  # dims of length 1 in the argument that the scheduler's sample does not have
    latent_dtype: torch.dtype
    timestep: str
    timestep_dims: int  # of the argument: 0 or 1 of a number an image, 2 of one a token
    timestep_dtype: torch.dtype
    per_image: frozenset[Path]  # arguments, or parts of them, with an entry for every image or prompt
    sign: int  # −1: the pipeline turns the output around before the scheduler sees it
    dims: Mapping[Path, int] = field(default_factory=dict)  # of those whose entries are not along dim 0

    def call(self, denoiser: nn.Module, arguments: dict[str, Any], latents: Tensor, timesteps: Tensor) -> Tensor:
        """Call `denoiser` as the pipeline does; returns its output `[M, …]` as the scheduler would get it, float32.

        Args:
            denoiser: the network.
            arguments: all but the latents and the timestep; what there is one of for every image has that dim first.
            latents: `[M, …]`, shaped as the scheduler's.
            timesteps: `[M]`, as the denoiser is told them.
        """
        given: Any = latents.to(self.latent_dtype)
        for dim in self.ones:
            given = given.unsqueeze(dim)
        told = timesteps.to(latents.device, self.timestep_dtype)
        if self.timestep_dims == 2:
            told = told[:, None].expand(-1, arguments[self.timestep].shape[1])
        if self.dims:
            arguments = rebuild(arguments, self._in_place)
        own = {self.latent: list(given.unbind(0)) if self.listed else given, self.timestep: told}
        return self.sign * as_sample(denoiser(**{**arguments, **own}), latents).float()

    def latents_of(self, arguments: dict[str, Any], like: Tensor) -> Tensor:
        """The latents of a recorded call, shaped as the scheduler's sample `like`."""
        given = arguments[self.latent]
        return (torch.stack(list(given)) if self.listed else given).reshape(like.shape)

    def _in_place(self, path: Path, node: Any) -> Any:
        return node.movedim(0, self.dims[path]) if path in self.dims else KEEP


def as_sample(output: Any, like: Tensor) -> Tensor:
    """A denoiser's answer in the shape of the scheduler's sample.

    A list is stacked, dims of length 1 go, and of twice the channels (models that also learnt a variance) the first
    half is taken.
    """
    if isinstance(output, dict):  # Diffusers' and Transformers' outputs are such
        output = next(iter(output.values()))
    elif isinstance(output, tuple):
        output = output[0]
    if isinstance(output, (list, tuple)):
        output = torch.stack(list(output))
    if output.ndim == like.ndim and output.shape[1] == 2 * like.shape[1]:
        output = output.chunk(2, dim=1)[0]
    return output.reshape(like.shape)
