"""Families marble does not name, which differ from the eight inside."""

from __future__ import annotations

from typing import Any

import diffusers

from . import text, vaes
from .families import SIZE
from .weights import redraw

_LATENT = SIZE // vaes.FACTOR


def pixart_sigma() -> Any:
    """The denoiser also predicts a variance, which the pipeline cuts off."""
    tokenizer = text.t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        transformer=redraw(
            diffusers.PixArtTransformer2DModel(
                sample_size=_LATENT,
                num_layers=2,
                num_attention_heads=4,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=32,
                caption_channels=text.WIDTH,
                use_additional_conditions=False,
            )
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=vaes.kl(scaling_factor=0.13025),
        text_encoder=text.t5(tokenizer),
        tokenizer=tokenizer,
    )


def lumina2() -> Any:
    """Time runs backwards, and the output's sign is turned."""
    tokenizer = text.gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=redraw(
            diffusers.Lumina2Transformer2DModel(
                sample_size=_LATENT,
                in_channels=4,
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=16,
                axes_dim_rope=(4, 2, 2),
                axes_lens=(256, 32, 32),
                cap_feat_dim=text.WIDTH,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vaes.kl(halvings=3, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.gemma(tokenizer),
        tokenizer=tokenizer,
    )


def auraflow() -> Any:
    """Registers among the text tokens, and text cut off by zeros instead of a mask."""
    tokenizer = text.t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        transformer=redraw(
            diffusers.AuraFlowTransformer2DModel(
                sample_size=_LATENT,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=text.WIDTH,
                caption_projection_dim=32,
                pos_embed_max_size=64,
            ),
            gain=1.2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vaes.kl(scaling_factor=0.13025),
        text_encoder=text.t5(tokenizer, kind="UMT5"),
        tokenizer=tokenizer,
    )


def hunyuandit() -> Any:
    """Velocity under DDPM, which draws noise at every step, and a variance that the pipeline cuts off."""
    first, second = text.bert_tokenizer(), text.t5_tokenizer()
    return diffusers.HunyuanDiTPipeline(
        transformer=redraw(
            diffusers.HunyuanDiT2DModel(
                sample_size=_LATENT,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                num_attention_heads=4,
                attention_head_dim=8,
                hidden_size=32,
                cross_attention_dim=text.WIDTH,
                cross_attention_dim_t5=text.WIDTH,
                pooled_projection_dim=32,
            )
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.03,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
            timestep_spacing="leading",
        ),
        vae=vaes.kl(halvings=3, scaling_factor=0.13025),
        text_encoder=text.bert(first),
        tokenizer=first,
        text_encoder_2=text.t5(second),
        tokenizer_2=second,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def cogview4() -> Any:
    """Text as long as the longest prompt of a batch, padded on its left, and two calls a step under guidance."""
    tokenizer = text.glm_tokenizer()
    return diffusers.CogView4Pipeline(
        transformer=redraw(
            diffusers.CogView4Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                text_embed_dim=text.WIDTH,
                time_embed_dim=32,
                condition_dim=8,
                pos_embed_max_size=_LATENT,
                sample_size=_LATENT,
                rope_axes_dim=(16, 16),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
        vae=vaes.kl(quant=False),
        text_encoder=text.glm(tokenizer),
        tokenizer=tokenizer,
    )
