"""Of the model card: the base model, and how to load the LoRA in Diffusers and in ComfyUI."""

from __future__ import annotations

from typing import Any

from marble.card.markdown import code, plain
from marble.card.results import guidance
from marble.catalogue import SCHEDULERS
from marble.export import COMFYUI_FILE, LORA_FILE, Base, public_source, without_paths
from marble.registry import known
from marble.run import Run

READ_BY_COMFYUI = ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")
"""Pipelines with a transformer for which ComfyUI maps the key names that Diffusers writes (docs/export.md)."""


def name_of(base: Base) -> str:
    """A base model in a sentence."""
    if base.kind == "hub":
        return f"[{plain(base.name)}](https://huggingface.co/{base.name})"
    if base.kind == "registered":
        return f"{code(base.name)}, a model that ships with {plain(_package(base.name))}"
    return f"a local pipeline ({code(base.pipeline)})" if base.pipeline else "a local pipeline"


def makes_videos(base: Base) -> bool:
    """Whether what the pipeline returns is called frames."""
    return "Video" in base.pipeline or base.pipeline.startswith("Wan")


def diffusers(run: Run, base: Base, repo: str) -> str:
    """Code that makes the evaluation's first picture with another seed."""
    config, model, evaluation = run.config, run.config.model, run.config.evaluation
    imports = ""
    if base.kind == "hub":
        where = _literal(base.name)
    elif base.kind == "registered":
        imports = f"from marble.policy import model_path  # {_package(base.name)} brings the base model\n"
        where = f"model_path({_literal(base.name)})"
    else:
        where = '"PATH/OF/THE/BASE"  # the pipeline that was fine-tuned'
    options = {"revision": model.revision, "variant": model.variant}
    loading = "".join(f", {name}={_literal(value)}" for name, value in options.items() if value is not None)
    loading += "" if model.dtype == "float32" else f", dtype=torch.{model.dtype}"
    loading += ", trust_remote_code=True" if model.trust_remote_code else ""
    merged = "".join(
        f"pipe.load_lora_weights({_literal(public_source(source))})  # merged before training\n"
        "pipe.fuse_lora()\npipe.unload_lora_weights()\n"
        for source in model.merge
    )
    prompts = run.evaluation().get("before", {}).get("prompts") or ["a prompt"]
    told = run.evaluation().get("guidance", {"guidance_scale": evaluation.guidance})
    call = {"num_inference_steps": evaluation.steps, **told}
    call |= without_paths(model.call)
    given = "".join(f"    {name}={_literal(value)},\n" for name, value in call.items())
    sampler = ""
    if evaluation.scheduler != "own":
        sampler = f" The evaluation’s scheduler was {plain(SCHEDULERS[evaluation.scheduler])}, not the pipeline’s own."
    return (
        "```python\n"
        f"import torch\nfrom diffusers import DiffusionPipeline\n{imports}\n"
        f"base = {where}\n"
        f"pipe = DiffusionPipeline.from_pretrained(base{loading})\n{merged}"
        f"pipe.load_lora_weights({_literal(repo)}, weight_name={_literal(LORA_FILE)})\n"
        f"image = pipe(\n    {_literal(prompts[0])},\n{given}"
        f"    generator=torch.Generator().manual_seed(0),\n).{'frames' if makes_videos(base) else 'images'}[0]\n"
        "```\n\n"
        f"It was trained with {guidance(config.rollout.guidance)}, and evaluated with "
        f"{guidance(evaluation.guidance)}, as above.{sampler}"
    )


def comfyui(run: Run, base: Base, tensors: dict[str, Any]) -> str:
    """Which file ComfyUI reads, if it does."""
    scale = run.config.evaluation.guidance
    how = f"into `models/loras` and use *LoraLoaderModelOnly* at strength 1, with CFG {scale:g}."
    judged = "Judged by the names of its layers; not tried there."
    if base.kind == "registered":
        text = f"ComfyUI has no loader for {code(base.name)}, so there is nothing there to apply this LoRA to."
    elif all(name.startswith("unet.") for name in tensors):
        text = (
            f"Put {code(COMFYUI_FILE)} {how} (Not {code(LORA_FILE)}: ComfyUI does not read the attention layers of a "
            f"U-Net in that layout.) {judged}"
        )
    elif base.pipeline in READ_BY_COMFYUI:
        text = f"Put {code(LORA_FILE)} {how} {judged}"
    else:
        text = (
            f"Whether ComfyUI reads the layers of {code(base.pipeline or 'this pipeline')} in this layout is unknown."
        )
    return "In ComfyUI: " + text


def _package(model: str) -> str:
    """The distribution that registers a model."""
    point = known("model").get(model)
    name = point.dist.name if point is not None and point.dist is not None else "another package"
    return "marble" if name == "marble-diffusion" else name


def _literal(value: Any) -> str:
    """A value as Python code on one line of ASCII, in which nothing can end a block of code."""
    return ascii(value)
