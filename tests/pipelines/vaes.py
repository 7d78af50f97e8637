"""Tiny autoencoders with random weights, each four times smaller in height and width."""

from __future__ import annotations

from typing import Any

import diffusers

from .weights import redraw

FACTOR = 4
"""Pixels per latent in height and width."""


def kl(*, halvings: int = 2, quant: bool = True, **options: Any) -> Any:
    """`AutoencoderKL` of `2 ** halvings` pixels per latent; `options` such as `scaling_factor`."""
    blocks = halvings + 1
    return redraw(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            mid_block_add_attention=False,
            **options,
        )
    )


def dc() -> Any:
    """Sana's `AutoencoderDC`."""
    return redraw(
        diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        )
    )


def wan() -> Any:
    """`AutoencoderKLWan`: four frames a latent, after the first."""
    return redraw(
        diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[-0.2, 0.1, 0.0, 0.3],
            latents_std=[1.5, 0.8, 1.0, 1.2],
            scale_factor_temporal=4,
            scale_factor_spatial=FACTOR,
        )
    )


def qwen() -> Any:
    """`AutoencoderKLQwenImage`, the same for one frame."""
    return redraw(
        diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.2, 0.1, 0.0, 0.3],
            latents_std=[1.5, 0.8, 1.0, 1.2],
        ),
        gain=1.2,
    )
