"""A Diffusers pipeline as a policy: sample with a set of weights, and predict clean latents along the way.

Leaves out any knowledge of a particular model: how the pipeline calls its denoiser is learnt by watching it
(`watch/`), what its noise levels are is asked of its scheduler (`noise/`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.memory import find_device, is_out_of_memory
from marble.noise import NOISE, NoiseLevels, levels_of
from marble.policy.loading import DTYPES, load_pipeline, place, save_memory
from marble.policy.sampling import (
    Caller,
    Job,
    Prediction,
    Samples,
    Schedulers,
    answer_of,
    check_pictures,
    images_of,
    in_pieces,
    jobs,
    unchecked,
)
from marble.policy.weights import FullWeights, LoRAWeights, Weights, copy, denoiser_of, load_lora, load_whole
from marble.shard import shard_base
from marble.watch import Conditioning, Manner, Seen, Watch, learn

T = TypeVar("T")


class Policy:
    """A pipeline with its trained weights in several versions (`ADAPTERS`)."""

    def __init__(self, pipe: Any, call: dict[str, Any] | None = None) -> None:
        """Take over a loaded pipeline; `call` is given to each of its calls."""
        self.pipe = pipe
        self.part = denoiser_of(pipe)
        self.caller = Caller(pipe, call or {}, self.part)
        self.denoiser: Any = getattr(pipe, self.part)
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        self.device = next(self.denoiser.parameters()).device
        self.in_step = False  # whether all processes call the denoiser together
        self.autocast: torch.dtype | None = None
        self._weights: Weights | None = None
        self._schedulers = Schedulers(pipe)
        self._manner: Manner | None = None
        self._most: dict[bool, int] = {}  # images that fitted into memory at once, with guidance and without

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        *,
        call: dict[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "float32",
        whole: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        quantize: str | None = None,
        merge: Sequence[str] = (),
        trust_remote_code: bool = False,
        checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload: str | None = None,
        shard: bool = False,
    ) -> Policy:
        """Load a pipeline.

        Args:
            id_or_path: hub id, folder, or a registered model's name (`mini`).
            call: arguments for every call of the pipeline, besides prompts, seeds, steps and guidance.
            device: where to put it; `auto`: this process's GPU, if there is one.
            dtype: of its weights: `float32`, `bfloat16` or `float16`.
            whole: load the denoiser in single precision whatever `dtype`, for `train_whole`.
            revision: branch, tag or commit on the hub.
            variant: of the files on the hub (`fp16`).
            quantize: `8bit` or `4bit` frozen weights (needs the extra `quantize`).
            merge: LoRA to add to the weights for good.
            trust_remote_code: let the model's own code run.
            checkpointing: make the denoiser's activations again on the way back instead of keeping them.
            vae_tiling: decode in tiles.
            vae_slicing: decode image by image.
            offload: `text` keeps text encoders in the CPU's memory while they are idle, `all` the VAE too.
            shard: leave the denoiser in the CPU's memory until `shard` is called.

        Raises:
            MarbleError: it is not there, or not a pipeline that can be trained.
        """
        where = find_device(device)
        if quantize and where.type == "cuda":
            torch.cuda.set_device(where)  # where bitsandbytes puts what it loads
        pipe = load_pipeline(
            id_or_path,
            dtype=DTYPES[dtype],
            whole=whole,
            revision=revision,
            variant=variant,
            quantize=quantize,
            text_too=offload is None,
            merge=merge,
            trust_remote_code=trust_remote_code,
        )
        part = denoiser_of(pipe)
        save_memory(pipe, part, checkpointing=checkpointing, vae_tiling=vae_tiling, vae_slicing=vae_slicing)
        place(pipe, part, where, offload=offload, later=shard)
        if DTYPES[dtype] != torch.float32 and where.type == "cuda":
            torch.set_float32_matmul_precision("high")  # what is left in single precision need not be exact
        policy = cls(pipe, call)
        if shard:
            policy.device = where
        return policy

    # ---- weights --------------------------------------------------------------------------------------

    def add_adapters(
        self, *, rank: int, alpha: int, targets: Sequence[str] | None = None, seed: int, start: str | None = None
    ) -> None:
        """Train a LoRA.

        Args:
            rank: of the two factors.
            alpha: scale of the adapter, times 1/rank.
            targets: endings of the layers' names; None for all of attention.
            seed: of the fresh adapter.
            start: a LoRA to go on from, whose own rank, scale and layers hold.

        Raises:
            MarbleError: one of `targets` is the ending of no layer's name, or `start` cannot be used.
        """
        if start is not None:
            self._weights = LoRAWeights.loaded(self.pipe, self.part, start)
        else:
            self._weights = LoRAWeights.fresh(self.pipe, self.part, rank=rank, alpha=alpha, targets=targets, seed=seed)

    def train_whole(self, dtype: str = "float32") -> None:
        """Train all of the denoiser, kept in single precision; `dtype` is what it calculates in."""
        self.denoiser.float()
        self.autocast = None if dtype == "float32" else DTYPES[dtype]
        self._weights = FullWeights(self.pipe, self.part)

    def shard(self) -> None:
        """Leave this process a share of the base model's weights (`marble.shard`); after `add_adapters`.

        Raises:
            MarbleError: there is one process, or the base is trained or quantised.
        """
        shard_base(self.denoiser, [p for slot in self.weights.slots.values() for p in slot], self.device)  # type: ignore[misc]
        self.in_step = True

    @property
    def weights(self) -> Weights:
        """The trained weights.

        Raises:
            MarbleError: there are none yet.
        """
        if self._weights is None:
            raise MarbleError("this policy has nothing to train: call add_adapters first")
        return self._weights

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [] if self._weights is None else self._weights.parameters

    @property
    def _slots(self) -> dict[str, list[Tensor]]:
        return self.weights.slots

    def copy_adapter(self, source: str, target: str, keep: float = 0.0) -> None:
        """`target ← keep · target + (1 − keep) · source`."""
        copy(self._slots[source], self._slots[target], keep)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """One version's weights by their names in the denoiser."""
        return self.weights.state(name)

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Put `adapter_state`'s weights back."""
        self.weights.load_state(name, state)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the denoiser with one version (None: the base) and go back to the trained one."""
        if adapter == "default" or self._weights is None:
            yield
            return
        self._weights.activate(adapter)
        try:
            yield
        finally:
            self._weights.activate("default")

    # ---- sampling -------------------------------------------------------------------------------------

    def learn(self, *, guidance: float = 1.0, scheduler: str = "own") -> Manner:
        """Find out how the pipeline calls its denoiser, by two short calls, unless that is known.

        Raises:
            MarbleError: it cannot be replayed; says what was seen.
        """
        if self._manner is None:

            def call(prompts: Sequence[str], each: int, steps: int) -> None:
                with torch.no_grad():
                    seeds = range(each * len(prompts))
                    self.caller(prompts, each, steps, guidance, seeds, output_type="latent")

            with self._schedulers.using(scheduler), self._calculating():
                try:
                    self._manner = learn(self.pipe, self.part, call)
                except MarbleError:  # some mix up several images of several prompts, some make one of each whatever
                    if self.caller.repeats_texts:
                        raise
                    self.caller.repeats_texts = True
                    self._manner = learn(self.pipe, self.part, call)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise MarbleError(
                        "out of memory while watching the pipeline make up to 4 images at once, without gradients: "
                        "lower their size (model.call), or use model.dtype, model.offload or model.quantize"
                    ) from error
        return self._manner

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        adapter: str | None = None,
        guidance: float = 1.0,
        scheduler: str = "own",
        noise: float = NOISE,
        batch: int = 256,
        seen: Callable[[Tensor], object] = lambda images: None,
        **call: Any,
    ) -> Samples:
        """Make `N = len(seeds)` images to train on, the first `N / len(prompts)` of the first prompt, and so on.

        Args:
            prompts: `[P]` texts, each encoded once per call of the pipeline.
            seeds: `[N]`, N a multiple of P; an image depends on its own seed alone.
            steps: denoising steps T.
            adapter: which version of the weights, None for the base model.
            guidance: guidance scale; 1, or the scale that a guidance-distilled model is told.
            scheduler: one of the catalogue's `SCHEDULERS`.
            noise: of the scheduler `sde` between a flow model's steps.
            batch: images in one call of the pipeline; fewer if memory does not suffice.
            seen: is given the next images of `N`, in order, as soon as they are made.
            call: further arguments of the pipeline.

        Raises:
            MarbleError: the pipeline cannot be watched, or refuses the arguments.
        """
        manner = self.learn(guidance=guidance, scheduler=scheduler)
        group = len(seeds) // len(prompts)

        def work(job: Job) -> tuple[Seen, Tensor]:
            with Watch(self.pipe, self.part) as watch:
                images = self._make(prompts, seeds, group, job, steps, guidance, call)
            return watch.seen(manner, job.each), images

        with self.using(adapter), self._schedulers.using(scheduler, noise):
            made = []
            for piece in self._in_pieces(len(prompts), group, batch, work, guided=False):
                made.append(piece)
                seen(piece[1])
            first = made[0][0]
            levels = levels_of(self.pipe.scheduler, first.steps, first.told)  # the same in every call
        return Samples.of_calls(made, levels)

    @torch.no_grad()
    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        adapter: str | None = None,
        guidance: float = 1.0,
        scheduler: str = "own",
        batch: int = 256,
        seen: Callable[[Tensor], object] = lambda images: None,
        **call: Any,
    ) -> Tensor:
        """Make the images of `sample` alone, `[N, 3, H, W]`; with any guidance, for nothing is watched."""
        if not self.caller.repeats_texts:
            with suppress(MarbleError):  # what cannot be trained can be looked at; every prompt is then repeated
                self.learn()
        group = len(seeds) // len(prompts)
        with self.using(adapter), self._schedulers.using(scheduler):
            parts = []
            make = lambda job: self._make(prompts, seeds, group, job, steps, guidance, call)  # noqa: E731
            for part in self._in_pieces(len(prompts), group, batch, make, guided=guidance != 1):
                parts.append(part)
                seen(part)
        images = torch.cat(parts)
        check_pictures(images)
        return images

    def _in_pieces(
        self, prompts: int, group: int, batch: int, work: Callable[[Job], T], *, guided: bool
    ) -> Iterator[T]:
        """`in_pieces`, no larger than what fitted into memory before."""
        found = functools.partial(self._most.__setitem__, guided)
        pending = list(jobs(prompts, group, min(batch, self._most.get(guided, batch))))
        return in_pieces(pending, work, self.device, retry=not self.in_step, note=found)

    def _make(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        group: int,
        job: Job,
        steps: int,
        guidance: float,
        call: dict[str, Any],
    ) -> Tensor:
        chosen = job.seeds(seeds, group)
        with self._calculating(), unchecked(self.pipe):
            result = self.caller(
                prompts[job.start : job.stop], job.each, steps, guidance, chosen, output_type="pt", **call
            )
        return images_of(result)

    @torch.no_grad()
    def picture(self, prompt: str, seed: int, *, scheduler: str = "own", **call: Any) -> Any:
        """One PIL image (a list of them if it is a video), by the call that a user of stock Diffusers would make."""
        with self._schedulers.using(scheduler):
            result = self.caller.run(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call)
        return answer_of(result)[0]

    @contextmanager
    def _calculating(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    # ---- training -------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, levels: NoiseLevels, conditioning: Conditioning, adapter: str | None) -> Prediction:
        """The clean latents that the denoiser sees behind `x_t`.

        Args:
            x_t: `[N, …]` noised latents.
            levels: of these N.
            conditioning: of these N images.
            adapter: as in `sample`. Gradients flow for `default` only.
        """
        with self.using(adapter), self._calculating():
            output = conditioning.call(self.denoiser, x_t, levels.timesteps)
        return Prediction(levels.clean(x_t, output), output)

    # ---- files ----------------------------------------------------------------------------------------

    def save(self, folder: Path, adapter: str = "ema") -> Path:
        """Write one version the way stock Diffusers reads it: `lora/`, or all of the denoiser; returns where."""
        return self.weights.save(folder, adapter)

    def load_lora(self, source: str | Path, field: str = "--lora") -> None:
        """Apply a LoRA in any layout that Diffusers reads.

        Raises:
            MarbleError: it is not there, or does not fit the model.
        """
        load_lora(self.pipe, str(source), field)

    def load_whole(self, folder: Path) -> None:
        """Replace the denoiser by one that full fine-tuning wrote.

        Raises:
            MarbleError: it is not there, or another model's.
        """
        load_whole(self.denoiser, folder, self.part)
