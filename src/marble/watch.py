"""Learns how a pipeline calls its denoiser by watching it do so."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's other arguments, one row per prompt where they differ between prompts.

    `rows` maps each of N images to a row: text is kept once per prompt, not once per image.
    """

    latent_argument: str
    timestep_argument: str
    per_prompt: dict[str, Tensor]  # each [P, …]
    shared: dict[str, Any]
    rows: Tensor  # [N] int64
    is_expanded: bool = False  # a row per image: `rows` counts up

    def __getitem__(self, images: Tensor) -> Conditioning:
        """The conditioning of some of the images."""
        return Conditioning(
            self.latent_argument, self.timestep_argument, self.per_prompt, self.shared, self.rows[images]
        )

    def expanded(self) -> Conditioning:
        """The same with a row per image, for several calls on the same images."""
        rows = torch.arange(len(self.rows))
        per_image = {name: value[self.rows] for name, value in self.per_prompt.items()}
        return Conditioning(self.latent_argument, self.timestep_argument, per_image, self.shared, rows, True)

    def call(self, denoiser: torch.nn.Module, latents: Tensor, timestep: Tensor) -> Tensor:
        """Call `denoiser` as the pipeline did, with other latents and timesteps."""
        arguments = dict(self.per_prompt if self.is_expanded else self.expanded().per_prompt)
        arguments |= {self.latent_argument: latents, self.timestep_argument: timestep}
        return denoiser(**arguments, **self.shared)[0]

    @staticmethod
    def join(parts: list[Conditioning]) -> Conditioning:
        """Of several calls of one pipeline, in order."""
        first, rows, offset = parts[0], [], 0
        for part in parts:
            rows.append(part.rows + offset)
            offset += int(part.rows.max()) + 1
        per_prompt = {name: torch.cat([part.per_prompt[name] for part in parts]) for name in first.per_prompt}
        return Conditioning(first.latent_argument, first.timestep_argument, per_prompt, first.shared, torch.cat(rows))


@dataclass(frozen=True)
class Seen:
    """What one call of the pipeline showed."""

    conditioning: Conditioning
    timesteps: Tensor  # [T] as the denoiser was told
    x0: Tensor  # [N, …] the scheduler's last sample


@dataclass
class Watch:
    """`with Watch(pipe, part) as watch: pipe(...)`, then `watch.seen()`."""

    pipe: Any
    part: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None

    def __enter__(self) -> Watch:
        denoiser, scheduler = getattr(self.pipe, self.part), self.pipe.scheduler
        signature = inspect.signature(denoiser.forward)
        step = scheduler.step

        def before_forward(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            bound = dict(signature.bind(*args, **kwargs).arguments)
            if not self.calls:
                self.calls.append(bound)
            else:  # the conditioning is kept once; of later calls only what changes
                self.calls.append({k: v for k, v in bound.items() if isinstance(v, Tensor) and v.ndim <= 1})

        def watched_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.samples:
                self.samples.append(sample)
            result = step(model_output, timestep, sample, *args, **kwargs)
            self.last = result[0] if isinstance(result, tuple) else result.prev_sample
            return result

        self._hook = denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)
        scheduler.step = watched_step
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self.pipe.scheduler.step

    def seen(self) -> Seen:
        """What was seen.

        Raises:
            MarbleError: the pipeline did not call its denoiser or scheduler in a way that can be replayed.
        """
        name = type(self.pipe).__name__
        if not self.calls or self.last is None:
            raise MarbleError(
                f"{name} cannot be watched: expected calls of {self.part} and scheduler.step, saw "
                f"{len(self.calls)} and {len(self.samples)}"
            )
        first, start = self.calls[0], self.samples[0]
        tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
        latent = [key for key, value in tensors.items() if value.shape == start.shape and torch.equal(value, start)]
        doubled = [key for key, value in tensors.items() if value.ndim == start.ndim and len(value) == 2 * len(start)]
        if not latent and doubled:  # guidance: the call holds both halves and is not to be trained on
            latent = [key for key in doubled if torch.equal(tensors[key][: len(start)], start)]
        if len(latent) != 1 or "timestep" not in tensors:
            raise MarbleError(
                f"{name} cannot be watched: expected one argument of {self.part} equal to the scheduler's sample and "
                f"a tensor `timestep`, saw {sorted(tensors)}"
            )
        times = torch.stack([call["timestep"].flatten()[0] for call in self.calls]).float().cpu()
        others = {key: value for key, value in first.items() if key not in (latent[0], "timestep")}
        count = len(start)
        per_image = {k: v for k, v in others.items() if isinstance(v, Tensor) and v.ndim and len(v) == count}
        shared = {k: v for k, v in others.items() if k not in per_image}
        rows, keep = _distinct(per_image, count)
        per_prompt = {key: value[keep].detach() for key, value in per_image.items()}
        return Seen(Conditioning(latent[0], "timestep", per_prompt, shared, rows), times, self.last.detach())


def _distinct(per_image: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Which of the images' neighbouring rows are the same: row of each image `[N]`, first image of each row `[P]`."""
    new = torch.zeros(count, dtype=torch.bool)
    new[0] = True
    for value in per_image.values():
        flat = value.flatten(1)
        new[1:] |= (flat[1:] != flat[:-1]).any(dim=1).cpu()
    return new.cumsum(0) - 1, new.nonzero().flatten()
