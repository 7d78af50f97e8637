"""CLIPs in the format of open_clip, by the names that transformers has for their weights.

Source: `src/open_clip/model.py` of mlfoundations/open_clip, whose text features are taken at the highest token, which
is the end of the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.rewards.checkpoint import load_into, materialise

_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(
    state: Mapping[str, Tensor],
    what: str = "the state dict",
    *,
    vision_heads: int = 16,
    text_heads: int = 16,
    activation: str = "gelu",
) -> Any:
    """A CLIP of transformers with the weights of one of open_clip; the defaults are those of ViT-H-14.

    Args:
        state: as open_clip saves it; sizes are read from it.
        what: names it in messages.
        vision_heads: of the vision transformer, which the weights do not tell.
        text_heads: of the text transformer.
        activation: of both.

    Raises:
        MarbleError: lists tensors that are missing, not expected, or of another shape.
    """
    from transformers import CLIPConfig, CLIPModel

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != axes:
            raise MarbleError(f'{what} is no CLIP of open_clip: it has no "{key}" of {axes} axes')
        return tuple(state[key].shape)

    def tower(prefix: str, heads: int) -> dict[str, Any]:
        prefix += "transformer.resblocks."
        layers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
        inner, width = shape(f"{prefix}0.mlp.c_fc.weight", 2)
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers)}
        return {**sizes, "num_attention_heads": heads, "hidden_act": activation}

    patch = shape("visual.conv1.weight", 4)[-1]
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    words = shape("token_embedding.weight", 2)[0]
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    length = shape("positional_embedding", 2)[0]
    config = CLIPConfig(
        vision_config={**tower("visual.", vision_heads), "patch_size": patch, "image_size": patch * grid},
        text_config={**tower("", text_heads), "vocab_size": words, "max_position_embeddings": length, **ends},
        projection_dim=shape("text_projection", 2)[1],
    )
    with torch.device("meta"):  # random weights would take longer than reading the real ones
        network = CLIPModel(config)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key != "attn_mask":
            renamed.update(_renamed(key, value))
    load_into(materialise(network), renamed, what)
    return network


def _renamed(key: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of open_clip under the name that transformers has for it; unknown ones keep theirs."""
    if key in ("visual.proj", "text_projection"):
        value = value.T
    stem, _, last = key.rpartition(".")
    if key in _NAMES or stem in _NAMES:
        return {_NAMES[key] if key in _NAMES else f"{_NAMES[stem]}.{last}": value}
    before, resblocks, after = key.partition("transformer.resblocks.")
    if not resblocks or before not in ("", "visual."):
        return {key: value}
    number, _, part = after.partition(".")
    layer = f"{'vision' if before else 'text'}_model.encoder.layers.{number}."
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        return {f"{layer}self_attn.{n}_proj.{kind}": v for n, v in zip("qkv", value.chunk(3), strict=True)}
    part, _, kind = part.rpartition(".")
    return {f"{layer}{_PARTS[part]}.{kind}" if part in _PARTS else key: value}
