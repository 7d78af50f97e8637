"""Calls of a pipeline, sized to the memory there is: which prompts and images go into each, and what comes out."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from marble.errors import MarbleError, nearest
from marble.memory import forget, is_out_of_memory
from marble.noise import NOISE, NoiseLevels, Trajectory, make_scheduler
from marble.rules import RESERVED_CALL
from marble.watch import Conditioning, Seen

SIZES = ("height", "width", "num_frames", "max_sequence_length")
"""Arguments that count something."""

GUIDANCE_OFFSET = {
    "Krea2Pipeline": -1.0,  # as the next
    "ZImagePipeline": -1.0,  # adds scale · (conditional − unconditional) to the conditional: none is 0, not 1
}
"""Pipelines whose guidance scale counts otherwise, and what to add to the usual one."""

log = logging.getLogger("marble")
T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Finished images and all that is needed to train on them."""

    x0: Tensor  # [N, …] clean latents, float32
    images: Tensor  # [N, 3, H, W] float in [0, 1], on the CPU; [N, F, 3, H, W] frames of a video
    conditioning: Conditioning
    levels: NoiseLevels  # of the sampler's T steps, falling
    trajectory: Trajectory | None = None  # how they came about, if the scheduler is `sde`

    def __getitem__(self, chosen: Tensor) -> Samples:
        """Some of the images."""
        x0, images, conditioning = self.x0[chosen.to(self.x0.device)], self.images[chosen], self.conditioning[chosen]
        trajectory = None if self.trajectory is None else self.trajectory[chosen]
        return replace(self, x0=x0, images=images, conditioning=conditioning, trajectory=trajectory)

    @classmethod
    def of_calls(cls, made: Sequence[tuple[Seen, Tensor]], levels: NoiseLevels) -> Samples:
        """What several calls showed and made, in order."""
        trajectories = [seen.trajectory for seen, _ in made if seen.trajectory is not None]
        return cls(
            torch.cat([seen.x0.float() for seen, _ in made]),
            torch.cat([images for _, images in made]),
            Conditioning.join([seen.conditioning for seen, _ in made]),
            levels,
            Trajectory.join(trajectories) if trajectories else None,
        )


@dataclass(frozen=True)
class Prediction:
    """The denoiser's answer at (x_t, t)."""

    x0: Tensor  # [N, …] predicted clean latents
    output: Tensor  # [N, …] the network's own output, with the sign that the scheduler expects (a velocity, say)


@dataclass(frozen=True)
class Job:
    """Images of one call: `each` of prompts `start` to `stop`, from the `first` of each prompt's on."""

    start: int
    stop: int
    first: int
    each: int

    def halves(self) -> list[Job]:
        """Two calls that make the same images in the same order."""
        if self.stop - self.start > 1:
            middle = (self.start + self.stop) // 2
            return [
                Job(self.start, middle, self.first, self.each),
                Job(middle, self.stop, self.first, self.each),
            ]
        half = self.each // 2
        return [
            Job(self.start, self.stop, self.first, half),
            Job(self.start, self.stop, self.first + half, self.each - half),
        ]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.each

    def seeds(self, seeds: Sequence[int], group: int) -> list[int]:
        """Of this call's images, among those of all prompts."""
        return [
            int(seeds[prompt * group + i])
            for prompt in range(self.start, self.stop)
            for i in range(self.first, self.first + self.each)
        ]


def jobs(prompts: int, group: int, batch: int) -> Iterator[Job]:
    """Whole prompts per call of the pipeline, or, where one group is too large, slices of one prompt's images."""
    if group <= batch:
        for start in range(0, prompts, batch // group):
            yield Job(start, min(start + batch // group, prompts), 0, group)
        return
    for prompt in range(prompts):
        for first in range(0, group, batch):
            yield Job(prompt, prompt + 1, first, min(batch, group - first))


def in_pieces(
    pending: list[Job],
    work: Callable[[Job], T],
    device: torch.device,
    *,
    retry: bool = True,
    note: Callable[[int], object] = lambda most: None,
) -> Iterator[T]:
    """`work` on each job; one for which memory does not suffice, and all after it, in halves.

    `note` is told how many are tried at once from then on.

    Raises:
        MarbleError: memory does not suffice for one image, or not at once and without `retry`.
    """
    pending, most = list(pending), None
    while pending:
        job = pending.pop(0)
        if most is not None and len(job) > most:
            pending[:0] = job.halves()
            continue
        try:
            result = work(job)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not retry:
                raise MarbleError(
                    f"out of memory while making {len(job)} images at once; with model.shard all processes keep step, "
                    "so that one cannot try again with fewer: use a lower rollout.batch"
                ) from error
            if len(job) == 1:
                raise MarbleError(
                    "out of memory while making a single image: lower its size (model.call), or use a smaller "
                    "model.dtype, model.offload, model.vae_tiling or model.quantize"
                ) from error
            most = (len(job) + 1) // 2
            note(most)
            log.warning(
                "out of memory while making %d images at once; going on with at most %d (rollout.batch)", len(job), most
            )
            pending.insert(0, job)
        else:
            yield result
            continue
        forget(device)  # out here the error no longer holds on to its tensors


def check_pictures(images: Tensor) -> None:
    """Check that pictures are finite: rewards would take what is not for black.

    Raises:
        MarbleError: says how many are not.
    """
    broken = sum(not image.isfinite().all() for image in images)
    if broken:
        raise MarbleError(
            f"{broken} of {len(images)} pictures are not finite though their latents are: the VAE cannot calculate in "
            "this model.dtype; bfloat16 or float32 usually helps"
        )


@contextmanager
def unchecked(pipe: Any) -> Iterator[None]:
    """Leave out Stable Diffusion's safety checker: rewards would judge the black pictures that it puts in."""
    checker = getattr(pipe, "safety_checker", None)
    if checker is not None:
        pipe.safety_checker = None
    try:
        yield
    finally:
        if checker is not None:
            pipe.safety_checker = checker


class Caller:
    """Calls a pipeline by one set of arguments, whatever its own names for them."""

    def __init__(self, pipe: Any, call: dict[str, Any], part: str) -> None:
        """For `pipe`; `call` is given to each of its calls.

        Raises:
            MarbleError: it takes no such argument.
        """
        self.pipe, self.call, self.part = pipe, dict(call), part
        self.repeats_texts = False  # every prompt as often as images are wanted of it
        self.known = inspect.signature(type(pipe).__call__).parameters
        for name in self.call:
            if name not in self.known:
                raise MarbleError(f"model.call: {type(pipe).__name__} takes no {name}.{nearest(name, self.known)}")
            if name in RESERVED_CALL:
                raise MarbleError(f"model.call: {name} is set by other settings; leave it out")
            if name in SIZES and (not isinstance(self.call[name], int) or self.call[name] < 1):
                raise MarbleError(f"model.call: {name} must be a whole number of at least 1, got {self.call[name]!r}")

    def __call__(
        self, prompts: Sequence[str], each: int, steps: int, guidance: float, seeds: Sequence[int], **call: Any
    ) -> Any:
        """Run the pipeline for `each` images of every prompt; an image depends on its own seed alone."""
        several = [name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in self.known]
        if several and not self.repeats_texts:
            texts, repeat = list(prompts), {several[0]: each}
        else:
            texts, repeat = [text for text in prompts for _ in range(each)], {}
        for guider in self.guiders:
            guider.guidance_scale = guidance
            if guidance == 1:
                guider.disable()
            else:
                guider.enable()
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        with _drawing_from(generators, self.pipe.scheduler):
            return self.run(
                prompt=texts,
                num_inference_steps=steps,
                generator=generators,
                **repeat,
                **{**self.guided(guidance), **self.call, **call},
            )

    @property
    def guiders(self) -> list[Any]:
        """Components that hold the guidance scale, of pipelines that are not told one."""
        parts = getattr(self.pipe, "components", {}).values()
        return [part for part in parts if hasattr(part, "guidance_scale") and hasattr(part, "disable")]

    def guided(self, guidance: float) -> dict[str, Any]:
        """The arguments that stand for a guidance scale.

        Raises:
            MarbleError: the pipeline knows no guidance.
        """
        embedded = getattr(getattr(self.pipe, self.part).config, "guidance_embeds", False)
        if "true_cfg_scale" in self.known and not embedded:
            # QwenImage, FLUX.1-schnell: guidance_scale is for distilled models and without effect on these
            return {"true_cfg_scale": guidance, "negative_prompt": "" if guidance > 1 else None}
        if "guidance_scale" in self.known:
            return {"guidance_scale": guidance + GUIDANCE_OFFSET.get(type(self.pipe).__name__, 0.0)}
        if guidance != 1 and not self.guiders:
            raise MarbleError(f"guidance: {type(self.pipe).__name__} knows none, got {guidance}; use 1")
        return {}

    def run(self, **call: Any) -> Any:
        """The pipeline itself.

        Raises:
            MarbleError: it refuses the arguments.
        """
        try:
            return self.pipe(**call)
        except (
            ValueError,
            TypeError,
            AssertionError,
            IndexError,
            AttributeError,
            NotImplementedError,
        ) as error:  # how pipelines refuse sizes and lengths
            reason = str(error) or type(error).__name__
            raise MarbleError(f"{type(self.pipe).__name__} refuses: {reason}") from error
        except RuntimeError as error:  # those that do not look at sizes before they use them
            if is_out_of_memory(error):
                raise
            if "size" not in str(error) and "shape" not in str(error):
                raise
            sizes = {name: value for name, value in call.items() if name in ("height", "width", "num_frames")}
            raise MarbleError(f"{type(self.pipe).__name__} cannot make {sizes or 'its own size'}: {error}") from error


class Schedulers:
    """What a pipeline may sample with, by name; made when first used."""

    def __init__(self, pipe: Any) -> None:
        """For `pipe`, which comes with one of its own."""
        self.pipe = pipe
        self.made = {"own": pipe.scheduler}

    @contextmanager
    def using(self, name: str, noise: float = NOISE) -> Iterator[None]:
        """Let the pipeline sample with one of `SCHEDULERS`; `noise` is that of `sde` for flow models."""
        if name not in self.made:
            self.made[name] = make_scheduler(name, self.made["own"])
        self.pipe.scheduler = self.made[name]
        if name == "sde":
            self.pipe.scheduler.noise = noise
        try:
            yield
        finally:
            self.pipe.scheduler = self.made["own"]


@contextmanager
def _drawing_from(generators: list[torch.Generator], scheduler: Any) -> Iterator[None]:
    """Let a scheduler that draws noise draw an image's from its own seed, though the pipeline forgets to tell it."""
    step, replaced = scheduler.step, "step" in vars(scheduler)
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines look at its signature to see whether it takes a generator
    def seeded(*args: Any, **kwargs: Any) -> Any:
        if signature.bind(*args, **kwargs).arguments.get("generator") is None:
            kwargs["generator"] = generators
        return step(*args, **kwargs)

    if "generator" in signature.parameters:
        scheduler.step = seeded
    try:
        yield
    finally:
        if replaced:
            scheduler.step = step
        else:
            vars(scheduler).pop("step", None)


def answer_of(result: Any) -> Any:
    """What a pipeline made, whatever its answer calls it."""
    return next(getattr(result, name) for name in ("images", "image", "frames") if hasattr(result, name))


def images_of(result: Any) -> Tensor:
    """`[N, 3, H, W]` of a pipeline's answer with `output_type="pt"`, `[N, F, 3, H, W]` if it is a video."""
    images = answer_of(result)
    if not isinstance(images, Tensor):
        images = torch.stack(list(images))
    return images.float().cpu()
