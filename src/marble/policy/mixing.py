"""Sums of trained weights: models between and beyond those that were trained, exactly, without merging anything.

A LoRA changes a layer by `delta W = scale · B A`. Several, mixed with weights λ, change it by
`sum_i λ_i scale_i B_i A_i`, which is not what the means of their factors would. Here each stays an adapter of its own,
and the layer adds them up: ranks, scales and layers may differ, and one LoRA at weight 1 calculates what it did alone,
bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from marble.config import LoRA, Model
from marble.errors import MarbleError, first_line
from marble.policy.loading import DTYPES
from marble.policy.policy import Policy
from marble.policy.weights import add_lora, check_fits, load_lora, load_whole
from marble.registry import known
from marble.storage import load_tree

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Ends of the names of files that hold weights."""


@dataclass(frozen=True)
class Stored:
    """Where the trained weights of one model lie."""

    path: Path  # `lora/`, the denoiser's folder after full fine-tuning, or the file of a checkpoint
    rank: int = 0  # of a checkpoint's LoRA, unless it has a start
    alpha: int = 0
    start: str | None = None  # LoRA that the run went on from, whose rank and scale its checkpoints have

    @classmethod
    def checkpoint(cls, path: Path, lora: LoRA) -> Stored:
        """What a checkpoint of a run with these settings holds."""
        return cls(path, lora.rank, lora.alpha, lora.start)

    @property
    def is_checkpoint(self) -> bool:
        """Whether a file holds the state of a whole run, of which the average is wanted."""
        return self.path.is_file()

    @property
    def files(self) -> list[Path]:
        """What there is of it; nothing if it is not there."""
        return [self.path] if self.is_checkpoint else sorted(self.path.glob("*.safetensors"))

    def average(self) -> dict[str, Tensor]:
        """The average that a checkpoint holds, by name.

        Raises:
            MarbleError: it cannot be read.
        """
        try:
            return load_tree(self.path, "adapters", "ema")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise MarbleError(f'the checkpoint "{self.path}" cannot be read: {first_line(error)}') from error


def file_stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Path, bytes and time of change of every file: cheap to take, unlike when one was written anew."""
    return [[str(file), (found := file.stat()).st_size, found.st_mtime_ns] for file in files]


def model_files(model: Model) -> list[list[Any]]:
    """Stamps of a model's weights and of the LoRA merged into them, where they lie in folders or files here."""
    places = [Path(place) for place in (*([] if model.id in known("model") else [model.id]), *model.merge)]
    found = [
        file
        for place in places
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.suffix in _WEIGHTS
    ]
    return file_stamps(found)


class LoRAMixture:
    """LoRA on a policy's denoiser, as many as the mixture in place needs."""

    def __init__(self, policy: Policy) -> None:
        """For a policy that trains nothing."""
        self.policy, self.denoiser = policy, policy.denoiser
        self._held: dict[Stored, str] = {}
        self._numbers = count()

    def put(self, parts: Mapping[Stored, float]) -> None:
        """Let the denoiser work with `sum_i λ_i · LoRA_i`; with nothing, it is the base model.

        Raises:
            MarbleError: one cannot be read, or does not fit the model.
        """
        parts = {stored: weight for stored, weight in parts.items() if weight}
        for stored in self._held.keys() - parts.keys():
            self._drop(stored)
        for stored in parts.keys() - self._held.keys():
            self._load(stored)
        names = {self._held[stored]: weight for stored, weight in parts.items()}
        for layer in self._layers():
            layer.set_adapter(list(names))
            for name, weight in names.items():
                layer.set_scale(name, weight)
            layer.enable_adapters(bool(names))
        self.denoiser.requires_grad_(False).eval()

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def _drop(self, stored: Stored) -> None:
        name = self._held.pop(stored)
        for layer in self._layers():
            layer.set_adapter([])
            layer.delete_adapter(name)
        del self.denoiser.peft_config[name]

    def _load(self, stored: Stored) -> None:
        name = f"mixed{next(self._numbers)}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            if stored.is_checkpoint:
                self._load_average(stored, name)
            else:
                load_lora(self.policy.pipe, str(stored.path), "model.lora", adapter_name=name)
        for key, parameter in self.denoiser.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.float()  # as in training
        self._held[stored] = name

    def _load_average(self, stored: Stored, name: str) -> None:
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        state = stored.average()
        if stored.start is not None:
            load_lora(self.policy.pipe, stored.start, "model.lora.start", adapter_name=name)
        else:
            layers = sorted({key.split(".lora_")[0] for key in state})
            add_lora(self.denoiser, LoraConfig(r=stored.rank, lora_alpha=stored.alpha, target_modules=layers), name)
        check_fits(get_peft_model_state_dict(self.denoiser, adapter_name=name), state)
        set_peft_model_state_dict(self.denoiser, state, adapter_name=name)


class FullMixture:
    """All of a denoiser's weights: `W = W_0 + sum_i λ_i (W_i − W_0)`."""

    def __init__(self, policy: Policy, dtype: str = "float32") -> None:
        """For a policy that trains nothing; its denoiser calculates in `dtype`, as in training."""
        self.policy, self.denoiser = policy, policy.denoiser
        self.denoiser.float()
        policy.autocast = None if dtype == "float32" else DTYPES[dtype]
        self._base = {name: p.detach().clone() for name, p in self.denoiser.named_parameters()}

    @torch.no_grad()
    def put(self, parts: Mapping[Stored, float]) -> None:
        """Put the mixture in place; with nothing, the base model.

        Raises:
            MarbleError: one cannot be read, or is another model's.
        """
        rest = 1 - sum(parts.values())
        mixed = {name: rest * weight for name, weight in self._base.items()}
        own = dict(self.denoiser.named_parameters())
        for stored, weight in parts.items():
            self._read(stored, own)
            for name, parameter in own.items():
                mixed[name] += weight * parameter
        for name, parameter in own.items():
            parameter.copy_(mixed[name])

    def _read(self, stored: Stored, own: Mapping[str, Tensor]) -> None:
        if not stored.is_checkpoint:
            load_whole(self.denoiser, stored.path, self.policy.part)
            return
        state = stored.average()
        check_fits(own, state)
        for name, parameter in own.items():
            parameter.copy_(state[name])


Mixture = LoRAMixture | FullMixture


def mixture_of(policy: Policy, *, whole: bool, dtype: str = "float32") -> Mixture:
    """What mixes LoRA, or with `whole` the weights of full fine-tuning, on a policy that trains nothing."""
    return FullMixture(policy, dtype) if whole else LoRAMixture(policy)
