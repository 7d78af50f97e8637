"""A Diffusers pipeline as a policy: sample with an adapter, and predict clean latents along the way.

Leaves out any knowledge of a particular model: what the pipeline gives its denoiser is recorded while it
runs (`watch.py`) and given again in training.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError, nearest
from marble.registry import known, resolve
from marble.watch import Conditioning, Watch

ADAPTERS = ("default", "old", "ema")
"""The trained adapter, the one that samples, and the average that is evaluated and exported. None is the base."""


@dataclass(frozen=True)
class Samples:
    """Finished images and all that is needed to train on them."""

    x0: Tensor  # [N, …] clean latents, float32
    images: Tensor  # [N, 3, H, W] float in [0, 1], on the CPU
    conditioning: Conditioning
    sigmas: Tensor  # [T] noise levels visited, falling
    timesteps: Tensor  # [T] what the denoiser was told of them


@dataclass(frozen=True)
class Prediction:
    """The denoiser's answer at (x_t, t)."""

    x0: Tensor  # [N, …] predicted clean latents
    output: Tensor  # [N, …] the network's own output (a velocity for flow models)


class Policy:
    """A pipeline with three LoRA adapters on its denoiser."""

    def __init__(self, pipe: Any, call: dict[str, Any] | None = None) -> None:
        """Take over a loaded pipeline; `call` is given to each of its calls."""
        self.pipe = pipe
        self.call = dict(call or {})
        known_arguments = inspect.signature(type(pipe).__call__).parameters
        for name in self.call:
            if name not in known_arguments:
                raise MarbleError(f"model.call: {type(pipe).__name__} takes no {name}.{nearest(name, known_arguments)}")
        self.part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
        self.denoiser: Any = getattr(pipe, self.part, None)
        if self.denoiser is None:
            raise MarbleError(f"{type(pipe).__name__} has neither a transformer nor a unet to train")
        if not hasattr(pipe.scheduler, "sigmas") or "FlowMatch" not in type(pipe.scheduler).__name__:
            raise MarbleError(
                f"{type(pipe).__name__} comes with {type(pipe.scheduler).__name__}; only flow-matching schedulers "
                "(FlowMatchEulerDiscreteScheduler) are supported"
            )
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        self.parameters: list[torch.nn.Parameter] = []
        self._slots: dict[str, list[torch.nn.Parameter]] = {}

    @classmethod
    def from_pretrained(cls, id_or_path: str, *, call: dict[str, Any] | None = None, device: str = "cpu") -> Policy:
        """Load a pipeline.

        Args:
            id_or_path: hub id, folder, or a registered model's name (`mini`).
            call: arguments for every call of the pipeline, besides prompts, seeds, steps and guidance.
            device: where to put it.

        Raises:
            MarbleError: it is not there, or not a pipeline that can be trained.
        """
        from diffusers import DiffusionPipeline

        path = model_path(id_or_path)
        _no_progress_bars()
        try:
            pipe = DiffusionPipeline.from_pretrained(path)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MarbleError(f'model "{id_or_path}" could not be loaded: {first}') from error
        return cls(pipe.to(device), call)

    # ---- adapters -------------------------------------------------------------------------------------

    def add_adapters(self, *, rank: int, alpha: int, targets: Sequence[str], seed: int) -> None:
        """Put a fresh LoRA on the denoiser, in three equal copies (`ADAPTERS`).

        Raises:
            MarbleError: one of `targets` is the ending of no layer's name.
        """
        from peft import LoraConfig

        names = [name for name, _ in self.denoiser.named_modules()]
        idle = [target for target in targets if not any(n == target or n.endswith("." + target) for n in names)]
        if idle:
            raise MarbleError(f"model.lora.targets: no layer of {self.part} matches {', '.join(idle)}")
        settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three are what we want
            torch.manual_seed(seed)
            for name in ADAPTERS:
                self.denoiser.add_adapter(settings, adapter_name=name)
        named = list(self.denoiser.named_parameters())
        self._slots = {name: [p for key, p in named if f".{name}." in key] for name in ADAPTERS}
        self.parameters = self._slots["default"]
        for name in ADAPTERS[1:]:
            self.copy_adapter("default", name)
        self._activate("default")

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str, keep: float = 0.0) -> None:
        """`target ← keep · target + (1 − keep) · source`."""
        for old, new in zip(self._slots[target], self._slots[source], strict=True):
            old.lerp_(new.to(old.dtype), 1 - keep)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The weights of one adapter by their names in the denoiser, the adapter's own left out."""
        from peft.utils import get_peft_model_state_dict

        return get_peft_model_state_dict(self.denoiser, adapter_name=name)

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Put `adapter_state`'s weights back."""
        from peft.utils import set_peft_model_state_dict

        set_peft_model_state_dict(self.denoiser, state, adapter_name=name)
        self._activate("default")

    def _activate(self, name: str | None) -> None:
        if not self._slots:
            return
        if name is None:
            self.denoiser.disable_adapters()
        else:
            self.denoiser.enable_adapters()
            self.denoiser.set_adapter(name)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the denoiser with one adapter (None: the base) and go back to the trained one."""
        if adapter == "default" or not self._slots:
            yield
            return
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate("default")

    # ---- sampling -------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        adapter: str | None = None,
        guidance: float = 1.0,
        batch: int = 256,
        **call: Any,
    ) -> Samples:
        """Make `N = len(seeds)` images, the first `N / len(prompts)` of the first prompt, and so on.

        Args:
            prompts: `[P]` texts, each encoded once per call of the pipeline.
            seeds: `[N]`, N a multiple of P; an image depends on its own seed alone.
            steps: denoising steps T.
            adapter: which adapter, None for the base model.
            guidance: guidance scale; 1 leaves classifier-free guidance out.
            batch: images in one call of the pipeline.
            call: further arguments of the pipeline.
        """
        group = len(seeds) // len(prompts)
        parts = []
        with self.using(adapter):
            for start, stop, each in _calls(len(prompts), group, batch):
                chosen = seeds[start * group :][: (stop - start) * group] if each is None else seeds[slice(*each)]
                generators = [torch.Generator().manual_seed(int(seed)) for seed in chosen]
                with Watch(self.pipe, self.part) as watch:
                    images = self._run(
                        prompt=list(prompts[start:stop]),
                        num_images_per_prompt=len(chosen) // (stop - start),
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        generator=generators,
                        output_type="pt",
                        **{**self.call, **call},
                    ).images
                parts.append((watch.seen(), images.float().cpu()))
        first = parts[0][0]
        scheduler = self.pipe.scheduler
        return Samples(
            torch.cat([seen.x0.float() for seen, _ in parts]),
            torch.cat([images for _, images in parts]),
            Conditioning.join([seen.conditioning for seen, _ in parts]),
            scheduler.sigmas[: len(first.timesteps)].float().clone(),
            first.timesteps,
        )

    def picture(self, prompt: str, seed: int, **call: Any) -> Any:
        """One PIL image, by the very call that a user of stock Diffusers would make."""
        return self._run(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    def _run(self, **call: Any) -> Any:
        try:
            return self.pipe(**call)
        except ValueError as error:  # how pipelines refuse sizes and lengths
            raise MarbleError(f"{type(self.pipe).__name__} refuses: {error}") from error

    # ---- training -------------------------------------------------------------------------------------

    def predict(
        self, x_t: Tensor, sigma: Tensor, timestep: Tensor, conditioning: Conditioning, adapter: str | None
    ) -> Prediction:
        """The clean latents that the denoiser sees behind `x_t`.

        Args:
            x_t: `[N, …]` noised latents.
            sigma: `[N]` their noise level.
            timestep: `[N]` what the denoiser is told of it.
            conditioning: of these N images.
            adapter: as in `sample`. Gradients flow for `default` only.
        """
        with self.using(adapter):
            velocity = conditioning.call(self.denoiser, x_t, timestep)
        return Prediction(x_t - _over(sigma, x_t) * velocity, velocity)

    @staticmethod
    def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`(1 − sigma) x0 + sigma noise`, `sigma` `[N]`."""
        level = _over(sigma, x0)
        return (1 - level) * x0 + level * noise

    # ---- files ----------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, adapter: str = "ema") -> None:
        """Write one adapter as `folder/pytorch_lora_weights.safetensors`, the way stock Diffusers reads it."""
        settings = self.denoiser.peft_config[adapter].to_dict()
        self.pipe.save_lora_weights(
            folder,
            **{
                f"{self.part}_lora_layers": self.adapter_state(adapter),
                f"{self.part}_lora_adapter_metadata": settings,
            },
        )

    def load_lora(self, folder: Path) -> None:
        """Apply a LoRA saved in Diffusers' layout.

        Raises:
            MarbleError: it is not there, or does not fit the model.
        """
        if not (folder / "pytorch_lora_weights.safetensors").is_file():
            raise MarbleError(f'"{folder}" holds no pytorch_lora_weights.safetensors')
        try:
            self.pipe.load_lora_weights(folder)
        except (ValueError, RuntimeError, KeyError) as error:
            raise MarbleError(
                f'the LoRA in "{folder}" does not fit this model: {str(error).splitlines()[0]}'
            ) from error


def model_path(id_or_path: str) -> str:
    """Where a model lies: a registered name is looked up, anything else is returned as it is.

    Raises:
        MarbleError: it looks like a folder and is not there or not a pipeline.
    """
    if id_or_path in known("model"):
        return str(resolve("model", id_or_path)())
    path = Path(id_or_path)
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise MarbleError(f'model "{id_or_path}" is not a Diffusers pipeline: it has no model_index.json')
        if '"_class_name"' not in index.read_text(encoding="utf-8", errors="replace"):
            raise MarbleError(f'model "{id_or_path}" is not a Diffusers pipeline: its model_index.json names no class')
    elif id_or_path.startswith((".", "/", "~")) or id_or_path.count("/") != 1:
        names = ", ".join(known("model"))
        raise MarbleError(
            f'model "{id_or_path}" does not exist: neither a folder, a hub id (owner/name), nor one of {names}'
        )
    return id_or_path


def _no_progress_bars() -> None:
    """Loading a pipeline draws a bar per part; downloads keep theirs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _over(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def _calls(prompts: int, group: int, batch: int) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    """Whole prompts per call of the pipeline, or, where one group is too large, slices of one prompt's images."""
    if group <= batch:
        for start in range(0, prompts, batch // group):
            yield start, min(start + batch // group, prompts), None
        return
    for prompt in range(prompts):
        for first in range(0, group, batch):
            yield prompt, prompt + 1, (prompt * group + first, prompt * group + min(first + batch, group))
