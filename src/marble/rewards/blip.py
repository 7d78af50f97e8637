"""BLIP as its authors publish it, brought to transformers' classes: vision transformer and image-grounded text encoder.

Leaves out what only pretraining needs: the decoder, the queues, the two projections.

| published                                          | transformers                                            |
|----------------------------------------------------|---------------------------------------------------------|
| `visual_encoder.cls_token`, `.pos_embed`           | `embeddings.class_embedding`, `.position_embedding`     |
| `visual_encoder.patch_embed.proj`                  | `embeddings.patch_embedding`                            |
| `visual_encoder.blocks.N.norm1`, `.norm2`          | `encoder.layers.N.layer_norm1`, `.layer_norm2`          |
| `visual_encoder.blocks.N.attn.qkv`, `.attn.proj`   | `encoder.layers.N.self_attn.qkv`, `.self_attn.projection` |
| `visual_encoder.blocks.N.mlp.fc1`, `.fc2`          | the same below `encoder.layers.N`                       |
| `visual_encoder.norm`                              | `post_layernorm`                                        |
| `text_encoder.*`                                   | the same                                                |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from marble.errors import MarbleError

HEAD = 64
"""Width of a head of the vision transformer: of 12 in the base, of 16 in the large."""

_NAMES = [
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
]
_UNUSED = re.compile(r"(vision_proj|text_proj)\.|.*\.position_ids$")


class BLIP(nn.Module):
    """An image encoder and a text encoder that looks at what it made; as large as a published state dict says."""

    def __init__(self, state: Mapping[str, Tensor], med: Mapping[str, Any], what: str) -> None:
        """Without weights; `load_into` fills them in.

        Args:
            state: as `renamed` has it.
            med: contents of the `med_config.json`; of these `num_attention_heads` counts, `hidden_act` and
                `layer_norm_eps`, since tensors do not show them. Its `encoder_width` is not looked at: BLIP's own code
                puts the vision transformer's width in its place.
            what: these weights, for messages.

        Raises:
            MarbleError: sizes cannot be told from `state`, or do not go with `med`.
        """
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        sizes = _Sizes(state, what)
        patches, _, patch, _ = sizes("visual_encoder.embeddings.patch_embedding.weight", 4)
        positions = sizes("visual_encoder.embeddings.position_embedding", 3)[1]
        words, width = sizes("text_encoder.embeddings.word_embeddings.weight", 2)
        heads = med.get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise MarbleError(
                f"{what}: num_attention_heads of its med_config.json must divide the text encoder's width, {width}, "
                f"got {heads!r}"
            )
        self.image_size = round((positions - 1) ** 0.5) * patch
        vision = BlipVisionConfig(
            hidden_size=patches,
            intermediate_size=sizes("visual_encoder.encoder.layers.0.mlp.fc1.weight", 2)[0],
            num_hidden_layers=sizes.layers("visual_encoder.encoder.layers"),
            num_attention_heads=max(1, patches // HEAD),
            image_size=self.image_size,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=words,
            hidden_size=width,
            encoder_hidden_size=patches,
            intermediate_size=sizes("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
            num_hidden_layers=sizes.layers("text_encoder.encoder.layer"),
            num_attention_heads=heads,
            max_position_embeddings=sizes("text_encoder.embeddings.position_embeddings.weight", 2)[0],
            hidden_act=med.get("hidden_act", "gelu"),
            layer_norm_eps=med.get("layer_norm_eps", 1e-12),
            bos_token_id=None,  # nothing is generated; the defaults would be wrong for another vocabulary
            eos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # makes the layers for cross attention; what masks the future is the argument of `forward`
        )
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What the text encoder makes of each text beside its image.

        Args:
            pixels: `[N, 3, image_size, image_size]`.
            ids: `[N, L]` int64, the texts' tokens.
            mask: `[N, L]`, 0 for padding.

        Returns:
            `[N, L, width]`.
        """
        seen = self.visual_encoder(pixel_values=pixels).last_hidden_state
        return self.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of BLIP with transformers' names, without what scoring does not use; other names stay."""
    named = {}
    for key, value in state.items():
        if _UNUSED.match(key):
            continue
        room, _, rest = key.partition(".")
        if room == "visual_encoder":
            for pattern, name in _NAMES:
                changed, hits = re.subn("^" + pattern, name, rest)
                if hits:
                    rest = changed
                    break
        named[f"{room}.{rest}" if rest else room] = value
    return named


class _Sizes:
    """Looks up shapes by name, and says which is not there."""

    def __init__(self, state: Mapping[str, Tensor], what: str) -> None:
        self.state, self.what = state, what

    def __call__(self, key: str, axes: int) -> tuple[int, ...]:
        """Shape of a tensor with so many axes."""
        if key not in self.state or self.state[key].ndim != axes:
            raise MarbleError(f'{self.what} is no checkpoint of BLIP: it has no "{key}" of {axes} axes')
        return tuple(self.state[key].shape)

    def layers(self, below: str) -> int:
        """How many numbered parts there are below a name."""
        found = {key[len(below) + 1 :].split(".")[0] for key in self.state if key.startswith(below + ".")}
        return len(found)
