"""Loads a pipeline in the way that fits the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from marble.errors import MarbleError
from marble.policy.weights import merge_lora
from marble.registry import known, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load_pipeline(
    id_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    text_too: bool = True,
    merge: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Any:
    """Load a pipeline into the CPU's memory (a quantised one where its library puts it).

    Args:
        id_or_path: hub id, folder, or a registered model's name.
        dtype: of all weights.
        whole: load the denoiser in single precision whatever `dtype`, to be trained whole.
        revision: branch, tag or commit on the hub.
        variant: of the files, `fp16` say.
        quantize: `8bit` or `4bit` for the denoiser's frozen weights, by bitsandbytes.
        text_too: quantise the larger text encoders as well.
        merge: LoRA to add to the weights for good, one after the other.
        trust_remote_code: let the model's own code run.

    Raises:
        MarbleError: it cannot be had, says why and what to do.
    """
    from diffusers import DiffusionPipeline

    path = model_path(id_or_path)
    _no_progress_bars()
    by_part = {"transformer": torch.float32, "unet": torch.float32, "default": dtype}
    options: dict[str, Any] = {
        "dtype": by_part if whole and dtype != torch.float32 else dtype,
        "revision": revision,
        "variant": variant,
    }
    if trust_remote_code:
        options["trust_remote_code"] = True
    options = {name: value for name, value in options.items() if value is not None}
    try:
        if quantize:
            options["quantization_config"] = _quantization(path, quantize, dtype, text_too, revision)
        pipe = DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise MarbleError(f'model "{id_or_path}" could not be loaded: {_reason(error, id_or_path)}') from error
    for source in merge:
        merge_lora(pipe, source, "model.merge")
    return pipe


def place(pipe: Any, part: str, device: torch.device, *, offload: str | None = None, later: bool = False) -> None:
    """Move a pipeline to its device.

    Args:
        pipe: the pipeline.
        part: its denoiser, which stays there.
        device: where to.
        offload: `text` keeps the text encoders in the CPU's memory but while they are at work, `all` the VAE too.
        later: leave the denoiser where it is.
    """
    from accelerate import cpu_offload_with_hook

    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    if later:
        del modules[part]
    away = {} if offload is None else {n: m for n, m in modules.items() if _is_offloaded(n, part, offload)}
    hooks = []
    for name, module in modules.items():
        if name in away:
            hooks.append(cpu_offload_with_hook(module, device)[1])
        elif not _is_quantized(module):
            module.to(device)

    def send_away(*_: object) -> None:
        for hook in hooks:
            hook.offload()

    if hooks:
        getattr(pipe, part).register_forward_pre_hook(send_away)


def save_memory(
    pipe: Any, part: str, *, checkpointing: bool = False, vae_tiling: bool = False, vae_slicing: bool = False
) -> None:
    """Trade time for memory.

    Args:
        pipe: the pipeline.
        part: its denoiser.
        checkpointing: the denoiser forgets activations and makes them again on the way back.
        vae_tiling: images are decoded in tiles; seams may differ a little.
        vae_slicing: images are decoded one by one.

    Raises:
        MarbleError: the model cannot.
    """
    if checkpointing:
        denoiser = getattr(pipe, part)
        if not getattr(denoiser, "_supports_gradient_checkpointing", False):
            raise MarbleError(f"model.checkpointing: {type(denoiser).__name__} does not support it; leave it out")
        denoiser.enable_gradient_checkpointing()
    for field, wanted, method in (
        ("vae_tiling", vae_tiling, "enable_tiling"),
        ("vae_slicing", vae_slicing, "enable_slicing"),
    ):
        if wanted:
            vae = getattr(pipe, "vae", None)
            if not hasattr(vae, method):
                raise MarbleError(f"model.{field}: {type(vae).__name__} does not support it; leave it out")
            try:
                getattr(vae, method)()
            except NotImplementedError as error:
                raise MarbleError(f"model.{field}: {type(vae).__name__} does not support it; leave it out") from error


def _is_offloaded(name: str, part: str, offload: str) -> bool:
    return name != part and (name.startswith("text_encoder") or offload == "all")


def _is_quantized(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_quantized", False) or getattr(module, "is_loaded_in_8bit", False))


def _quantization(path: str, bits: str, dtype: torch.dtype, text_too: bool, revision: str | None) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MarbleError(f'model.quantize: {bits} needs bitsandbytes: pip install "marble-diffusion[quantize]"')
    if not torch.cuda.is_available():
        raise MarbleError(f"model.quantize: {bits} needs a GPU that bitsandbytes knows; there is none here")
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    kind = "bitsandbytes_4bit" if bits == "4bit" else "bitsandbytes_8bit"
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == "4bit":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    parts = [
        name
        for name in DiffusionPipeline.load_config(path, revision=revision)
        if name in ("transformer", "unet") or (text_too and name in ("text_encoder_2", "text_encoder_3"))
    ]
    return PipelineQuantizationConfig(quant_backend=kind, quant_kwargs=settings, components_to_quantize=parts)


def _reason(error: Exception, name: str) -> str:
    """One line on why a model cannot be loaded, with what to do about it."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    if any(isinstance(e, GatedRepoError) for e in chain):
        return (
            f"its licence must be accepted first: open https://huggingface.co/{name}, accept it, and log in with "
            "`hf auth login` (or set HF_TOKEN)"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return "there is no such model on the hub, or it is private: check the name, or log in with `hf auth login`"
    text = str(error).strip()
    offline = any(isinstance(e, (LocalEntryNotFoundError, ConnectionError)) for e in chain)
    if offline or any(word in text.lower() for word in ("connect", "offline", "not fully cached", "cannot find")):
        return (
            "the hub cannot be reached, and the model is not in the cache: check the network, or download it where "
            f"there is one (`hf download {name} --local-dir FOLDER`) and give the folder as model.id"
        )
    return text.splitlines()[0] if text else type(error).__name__


def _no_progress_bars() -> None:
    """Loading a pipeline draws a bar per part; downloads keep theirs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
