"""The trained weights in their versions: trained, sampling, averaged, and none (the base model's)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marble.errors import MarbleError, first_line

ADAPTERS = ("default", "old", "ema")
"""The trained version, the one that samples, and the average that is evaluated and exported. None is the base."""

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_out", "to_qkv_mlp_proj", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "to_query", "to_key", "to_value"),
)
"""Endings of the names that Diffusers gives to the linear layers of attention; the first eight in most models."""


PEFT_FILE = "adapter_model.safetensors"


class LoRAWeights:
    """Three equal LoRA on a denoiser, one of them active."""

    def __init__(self, pipe: Any, part: str) -> None:
        """For the adapters that `pipe`'s component `part` has; see `fresh` and `loaded`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.pipe, self.part = pipe, part
        self.denoiser: Any = getattr(pipe, part)
        self._layers = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in self.denoiser.named_parameters():
            if any(f".{adapter}." in name for adapter in ADAPTERS):
                parameter.data = parameter.data.float()  # in half precision small steps of the optimiser are lost
        named = list(self.denoiser.named_parameters())
        self.slots: dict[str, list[Tensor]] = {a: [p for key, p in named if f".{a}." in key] for a in ADAPTERS}
        if not self.slots["default"]:
            raise MarbleError(f"model.lora: nothing of it belongs to the {part}")
        for name in ADAPTERS[1:]:
            copy(self.slots["default"], self.slots[name])
        self.denoiser.eval()  # a LoRA of elsewhere may bring dropout
        self.activate("default")

    @classmethod
    def fresh(
        cls, pipe: Any, part: str, *, rank: int, alpha: int, targets: Sequence[str] | None, seed: int
    ) -> LoRAWeights:
        """Without effect at first.

        Raises:
            MarbleError: one of `targets` is the ending of no layer's name, or no layer looks like attention.
        """
        from peft import LoraConfig

        denoiser = getattr(pipe, part)
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=find_targets(denoiser, part, targets),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three are what we want
            torch.manual_seed(seed)
            for name in ADAPTERS:
                add_lora(denoiser, settings, name)
        return cls(pipe, part)

    @classmethod
    def loaded(cls, pipe: Any, part: str, source: str) -> LoRAWeights:
        """From a LoRA in any layout that Diffusers reads, to go on from.

        Raises:
            MarbleError: it cannot be read, or has nothing for the denoiser.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in ADAPTERS:
                load_lora(pipe, source, "model.lora.start", adapter_name=name)
        for other, module in pipe.components.items():
            if other != part and getattr(module, "peft_config", None):
                raise MarbleError(
                    f'model.lora.start: "{source}" has weights for the {other} too, which is not trained; merge it '
                    "with model.merge, or start from its part for the denoiser"
                )
        if not getattr(getattr(pipe, part), "peft_config", None):
            raise MarbleError(f'model.lora.start: "{source}" has no weights for the {part}')
        return cls(pipe, part)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.slots["default"]  # type: ignore[return-value]

    def activate(self, name: str | None) -> None:
        """Let the denoiser work with one version; None: the base model."""
        for layer in self._layers:
            if name is None:
                layer.enable_adapters(False)
            elif layer.disable_adapters or layer.active_adapters != [name]:
                layer.set_adapter([name])
                layer.enable_adapters(True)

    def state(self, name: str) -> dict[str, Tensor]:
        """The weights of one version by their names in the denoiser, the version's own left out."""
        from peft.utils import get_peft_model_state_dict

        return get_peft_model_state_dict(self.denoiser, adapter_name=name)

    def load_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Put `state`'s weights back; MarbleError if they are not this model's."""
        check_fits(self.state(name), state)
        from peft.utils import set_peft_model_state_dict

        set_peft_model_state_dict(self.denoiser, state, adapter_name=name)
        self.activate("default")

    def save(self, folder: Path, name: str) -> Path:
        """Write one version as `folder/lora/pytorch_lora_weights.safetensors`, the way stock Diffusers reads it."""
        if not hasattr(self.pipe, "save_lora_weights"):
            return self._save_for_peft(folder / "lora", name)
        settings = self.denoiser.peft_config[name].to_dict()
        layers = {f"{self.part}_lora_layers": self.state(name), f"{self.part}_lora_adapter_metadata": settings}
        self.pipe.save_lora_weights(folder / "lora", **layers)
        return folder / "lora"

    def _save_for_peft(self, folder: Path, name: str) -> Path:
        """Write one version the way stock PEFT reads it (`PeftModel.from_pretrained`)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"base_model.model.{key}": value.contiguous() for key, value in self.state(name).items()}
        save_file(state, folder / PEFT_FILE)
        self.denoiser.peft_config[name].save_pretrained(folder)
        return folder


class FullWeights:
    """All of a denoiser's weights, in four versions of which one is in place."""

    def __init__(self, pipe: Any, part: str) -> None:
        """Copy the base model's weights for the versions."""
        self.part, self.denoiser = part, getattr(pipe, part)
        self.denoiser.requires_grad_(True)
        named = list(self.denoiser.named_parameters())
        self.names = [name for name, _ in named]
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        self._live = [p.data for p in self.parameters]
        self._base = [p.detach().clone() for p in self.parameters]
        self.slots: dict[str, list[Tensor]] = {"default": list(self.parameters)}
        self.slots |= {name: [p.detach().clone() for p in self.parameters] for name in ADAPTERS[1:]}

    def activate(self, name: str | None) -> None:
        """Put one version in place; None: the base model."""
        chosen = self._live if name == "default" else self._base if name is None else self.slots[name]
        for parameter, value in zip(self.parameters, chosen, strict=True):
            parameter.data = value

    def state(self, name: str) -> dict[str, Tensor]:
        """The weights of one version by name."""
        chosen = self._live if name == "default" else self.slots[name]
        return dict(zip(self.names, chosen, strict=True))

    @torch.no_grad()
    def load_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Put `state`'s weights back; MarbleError if they are not this model's."""
        check_fits(self.state(name), state)
        for key, value in self.state(name).items():
            value.copy_(state[key])

    def save(self, folder: Path, name: str) -> Path:
        """Write one version as `folder/PART/`, the way stock Diffusers reads a pipeline's component."""
        self.activate(name)
        try:
            self.denoiser.save_pretrained(folder / self.part)
        finally:
            self.activate("default")
        return folder / self.part


Weights = LoRAWeights | FullWeights


@torch.no_grad()
def copy(source: Sequence[Tensor], target: Sequence[Tensor], keep: float = 0.0) -> None:
    """`target ← keep · target + (1 − keep) · source`."""
    for old, new in zip(target, source, strict=True):
        old.lerp_(new.to(old.dtype), 1 - keep)


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that weights read from a checkpoint are those of the model at hand.

    Raises:
        MarbleError: names what is unlike.
    """
    unlike = sorted(own.keys() ^ state.keys())
    unlike += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if unlike:
        raise MarbleError(
            f"the checkpoint is of another model or another LoRA than the config's: {len(unlike)} of its weights are "
            f"missing, too many or of another shape, {', '.join(unlike[:2])}"
        )


def denoiser_of(pipe: Any) -> str:
    """The name of the component that denoises.

    Raises:
        MarbleError: there is none, or there are two.
    """
    name = type(pipe).__name__
    if getattr(pipe, "transformer_2", None) is not None:
        raise MarbleError(f"{name} denoises with two networks (transformer and transformer_2); one can be trained")
    for part in ("transformer", "unet"):
        if getattr(pipe, part, None) is not None:
            if not hasattr(pipe, "scheduler"):
                raise MarbleError(f"{name} has no scheduler")
            return part
    parts = ", ".join(n for n, m in pipe.components.items() if isinstance(m, nn.Module))
    raise MarbleError(f"{name} has neither a transformer nor a unet to train; it has {parts}")


def find_targets(denoiser: nn.Module, part: str, targets: Sequence[str] | None) -> list[str]:
    """The endings of layers' names that a LoRA goes on: those given, or those of attention.

    Raises:
        MarbleError: one matches nothing; the message has names that would.
    """
    names = [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]

    def matches(ending: str) -> bool:
        return any(name == ending or name.endswith("." + ending) for name in names)

    if targets is None:
        # `to_out` is a layer in some models and a list of layers in others, sometimes in one: by its whole name
        found = [ending for ending in ATTENTION if ending != "to_out" and matches(ending)]
        found += [name for name in names if name.endswith(".to_out")]
        if not found:
            raise MarbleError(
                f"model.lora.targets: no layer of {part} is named like attention ({', '.join(ATTENTION[:4])} …); give "
                f"endings of its linear layers' names, such as {_examples(names)}"
            )
        return found
    idle = [target for target in targets if not matches(target)]
    if idle:
        raise MarbleError(
            f"model.lora.targets: no layer of {part} matches {', '.join(idle)}; its linear layers end in "
            f"{_examples(names)}"
        )
    return list(targets)


def find_lora(source: str, field: str) -> Path:
    """Where a LoRA lies; what is no path here may be a hub id.

    Raises:
        MarbleError: names the field: it holds no LoRA, or is neither there nor a hub id.
    """
    path = Path(source)
    if path.is_dir() and not list(path.glob("*.safetensors")):
        raise MarbleError(f'{field}: "{source}" holds no .safetensors file (pytorch_lora_weights.safetensors, say)')
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise MarbleError(f'{field}: "{source}" is neither a file, a folder nor a hub id (owner/name)')
    return path


def add_lora(denoiser: Any, settings: Any, name: str) -> None:
    """Put a fresh LoRA of PEFT's `settings` on a denoiser, beside those that it has."""
    from peft import inject_adapter_in_model

    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(settings, adapter_name=name)
    else:  # models that Diffusers gives no LoRA, such as PixArt's
        inject_adapter_in_model(settings, denoiser, adapter_name=name)


def load_lora(pipe: Any, source: str, field: str, **options: Any) -> None:
    """Apply a LoRA in any layout that Diffusers reads.

    Raises:
        MarbleError: names the field: it is not there, or does not fit the model.
    """
    path = find_lora(source, field)
    before = _adapters(pipe)
    try:
        if not hasattr(pipe, "load_lora_weights"):
            _load_for_peft(pipe, path, **options)
            return
        strangers = _strangers(pipe, source)
        pipe.load_lora_weights(source, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not path.exists():
            raise MarbleError(
                f'{field}: "{source}" is no folder here, and could not be had from the hub: {reason}'
            ) from error
        raise MarbleError(f'{field}: the LoRA in "{source}" does not fit this model: {reason}') from error
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()  # it may bring dropout
    if strangers:
        raise MarbleError(
            f'{field}: the LoRA in "{source}" is another model\'s: {len(strangers)} of its layers are not in this one, '
            f"{', '.join(strangers[:3])}"
        )
    if _adapters(pipe) == before:  # Diffusers only logs that it found nothing
        raise MarbleError(f'{field}: nothing of the LoRA in "{source}" belongs to a {type(pipe).__name__}')


def scale_lora(pipe: Any, scale: float) -> None:
    """Multiply the strength of all LoRA of a pipeline by `scale`; 0 is the model without them."""
    from peft.tuners.lora import LoraLayer

    for component in pipe.components.values():
        for layer in component.modules() if isinstance(component, nn.Module) else ():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)


def merge_lora(pipe: Any, source: str, field: str) -> None:
    """Add a LoRA to the weights for good.

    Raises:
        MarbleError: as `load_lora`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    load_lora(pipe, source, field)
    if hasattr(pipe, "fuse_lora"):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return
    denoiser = getattr(pipe, denoiser_of(pipe))
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            denoiser.set_submodule(name, layer.get_base_layer())
    del denoiser.peft_config


def _strangers(pipe: Any, source: str) -> list[str]:
    """Layers of the denoiser that a LoRA's file has and the model has not, of which Diffusers only warns."""
    if not hasattr(pipe, "lora_state_dict"):
        return []
    state = pipe.lora_state_dict(source, use_safetensors=True)
    state = state[0] if isinstance(state, tuple) else state
    part = denoiser_of(pipe)
    own = {name for name, _ in getattr(pipe, part).named_modules()}
    found = {key.split(".lora_A.")[0] for key in state if key.startswith(part + ".") and ".lora_A." in key}
    return sorted(layer for layer in found if layer.removeprefix(part + ".") not in own)


def _adapters(pipe: Any) -> int:
    """How many adapters a pipeline's components have, all together."""
    return sum(len(getattr(module, "peft_config", None) or {}) for module in pipe.components.values())


def _load_for_peft(pipe: Any, folder: Path, adapter_name: str = "default") -> None:
    """Apply what stock PEFT reads to a denoiser that Diffusers gives no LoRA."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import set_peft_model_state_dict

    denoiser = getattr(pipe, denoiser_of(pipe))
    inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), denoiser, adapter_name=adapter_name)
    state = load_file(folder / PEFT_FILE)
    own = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    names = {name for name, _ in denoiser.named_modules()}
    if strangers := sorted({key.split(".lora_")[0] for key in own} - names):
        raise ValueError(f"{len(strangers)} of its layers are not in this one, {', '.join(strangers[:3])}")
    set_peft_model_state_dict(denoiser, own, adapter_name=adapter_name)


def _examples(names: Sequence[str]) -> str:
    endings: dict[str, int] = {}
    for name in names:
        last = [part for part in name.split(".") if not part.isdigit()][-1]
        endings[last] = endings.get(last, 0) + 1
    return ", ".join(sorted(endings, key=lambda ending: -endings[ending])[:8])


def load_whole(denoiser: Any, folder: Path, part: str) -> None:
    """Replace all weights of `denoiser`, the pipeline's `part`, by those in `folder`.

    Raises:
        MarbleError: they are not there, or another model's.
    """
    try:
        found = type(denoiser).from_pretrained(folder, dtype=denoiser.dtype)
        denoiser.load_state_dict(found.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise MarbleError(f'"{folder}" holds no {part} of this model: {first_line(error)}') from error
