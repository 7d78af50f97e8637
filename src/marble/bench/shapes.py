"""Denoisers to measure on: real configurations and scaled-down ones, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from marble.policy.weights import ATTENTION

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Shape:
    """A denoiser and what it is called with."""

    about: str
    build: Callable[[], nn.Module]
    latents: tuple[int, ...]  # of one image
    inputs: Callable[[int], dict[str, Any]]  # everything but latents and timestep, for N images
    latent_argument: str
    targets: list[str]
    batch: int


def _sd3(width: int, layers: int, dual: int, side: int, tokens: int, text: int, batch: int, about: str) -> Shape:
    def build() -> nn.Module:
        from diffusers import SD3Transformer2DModel

        network: Any = SD3Transformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=width // 64,
            joint_attention_dim=text,
            caption_projection_dim=width,
            pooled_projection_dim=2048,
            pos_embed_max_size=max(side // 2, 192),
            dual_attention_layers=tuple(range(dual)),
            qk_norm="rms_norm",
        )
        return network

    def inputs(count: int) -> dict[str, Any]:
        return {
            "encoder_hidden_states": torch.randn(count, tokens, text),
            "pooled_projections": torch.randn(count, 2048),
        }

    return Shape(about, build, (16, side, side), inputs, "hidden_states", list(ATTENTION[:8]), batch)


def _unet(channels: tuple[int, ...], depth: tuple[int, ...], head: int, text: int, side: int, about: str) -> Shape:
    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        settings: dict[str, Any] = {
            "sample_size": side,
            "block_out_channels": channels,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": depth,
            "attention_head_dim": tuple(width // head for width in channels),
            "cross_attention_dim": text,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
        network: Any = UNet2DConditionModel(**settings)
        return network

    def inputs(count: int) -> dict[str, Any]:
        added = {"text_embeds": torch.randn(count, 1280), "time_ids": torch.rand(count, 6) * 1024}
        return {"encoder_hidden_states": torch.randn(count, 77, text), "added_cond_kwargs": added}

    return Shape(about, build, (4, side, side), inputs, "sample", UNET_TARGETS, 4)


SHAPES = {
    "sd3-small": _sd3(384, 6, 0, 32, 77, 384, 8, "SD3, width 384, 6 layers, 256 image tokens: for a CPU"),
    "sd35-small": _sd3(384, 6, 3, 32, 154, 1024, 8, "SD3.5 with its dual attention, width 384, 6 layers: for a CPU"),
    "sd35-medium": _sd3(1536, 24, 13, 64, 333, 4096, 8, "SD3.5-Medium's own configuration at 512 px: for a GPU"),
    "sdxl-small": _unet((64, 128, 256), (1, 2, 4), 64, 256, 32, "SDXL's UNet, a fifth as wide: for a CPU"),
    "sdxl-unet": _unet((320, 640, 1280), (1, 2, 10), 64, 2048, 128, "SDXL's UNet at 1024 px: for a GPU"),
}
"""By name. `mini`, the embedded model, is measured over whole epochs as well (`epoch.py`)."""
