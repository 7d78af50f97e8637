"""The eight families marble names: denoiser and scheduler as users have them, only small."""

from __future__ import annotations

from typing import Any

import diffusers

from . import text, vaes
from .weights import redraw

SIZE = 32
"""Height and width of the images in pixels."""
TOKENS = 48
"""Text tokens, where a pipeline lets its caller choose."""
_LATENT = SIZE // vaes.FACTOR


def _unet(**options: Any) -> Any:
    return redraw(
        diffusers.UNet2DConditionModel(
            sample_size=_LATENT,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            **options,
        )
    )


def sd15(prediction_type: str = "epsilon") -> Any:
    tokenizer = text.clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=text.WIDTH),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type=prediction_type,
        ),
        vae=vaes.kl(),
        text_encoder=text.clip(tokenizer),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_v() -> Any:
    """Stable Diffusion 1.5 that predicts the velocity, as 2.1 does."""
    return sd15("v_prediction")


def sdxl() -> Any:
    first, second = text.clip_tokenizer(), text.clip_tokenizer(pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        unet=_unet(
            cross_attention_dim=2 * text.WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=text.WIDTH + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=vaes.kl(scaling_factor=0.13025),
        text_encoder=text.clip(first),
        tokenizer=first,
        text_encoder_2=text.clip(second, projection=True),
        tokenizer_2=second,
        add_watermarker=False,
    )


def sd3() -> Any:
    first, second, third = text.clip_tokenizer(), text.clip_tokenizer(pad_token="!"), text.t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=redraw(
            diffusers.SD3Transformer2DModel(
                sample_size=_LATENT,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=2 * text.WIDTH,
                caption_projection_dim=32,
                pooled_projection_dim=2 * text.WIDTH,
                pos_embed_max_size=_LATENT,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vaes.kl(quant=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text.clip(first, projection=True),
        tokenizer=first,
        text_encoder_2=text.clip(second, projection=True),
        tokenizer_2=second,
        text_encoder_3=text.t5(third, width=2 * text.WIDTH),
        tokenizer_3=third,
    )


def flux() -> Any:
    """FLUX.1-dev: guidance is an input of the transformer."""
    first, second = text.clip_tokenizer(), text.t5_tokenizer()
    return diffusers.FluxPipeline(
        transformer=redraw(
            diffusers.FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=text.WIDTH,
                pooled_projection_dim=text.WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(2, 2, 4),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vaes.kl(quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.clip(first),
        tokenizer=first,
        text_encoder_2=text.t5(second),
        tokenizer_2=second,
    )


def sana() -> Any:
    tokenizer = text.gemma_tokenizer()
    return diffusers.SanaPipeline(
        transformer=redraw(
            diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=4,
                cross_attention_head_dim=8,
                cross_attention_dim=32,
                caption_channels=text.WIDTH,
                sample_size=_LATENT,
            )
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vaes.dc(),
        text_encoder=text.gemma(tokenizer),
        tokenizer=tokenizer,
    )


def qwenimage() -> Any:
    tokenizer = text.qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        transformer=redraw(
            diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=text.WIDTH,
                axes_dims_rope=(2, 2, 4),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vaes.qwen(),
        text_encoder=text.qwen_vl(tokenizer),
        tokenizer=tokenizer,
    )


def zimage() -> Any:
    tokenizer = text.qwen_tokenizer()
    return diffusers.ZImagePipeline(
        transformer=redraw(
            diffusers.ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=4,
                n_kv_heads=4,
                cap_feat_dim=text.WIDTH,
                axes_dims=[2, 2, 4],
                axes_lens=[512, 32, 32],
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vaes.kl(quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.qwen3(tokenizer),
        tokenizer=tokenizer,
    )


def wan() -> Any:
    tokenizer = text.t5_tokenizer()
    return diffusers.WanPipeline(
        transformer=redraw(
            diffusers.WanTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=8,
                text_dim=text.WIDTH,
                freq_dim=32,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            )
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vaes.wan(),
        text_encoder=text.t5(tokenizer, kind="UMT5"),
        tokenizer=tokenizer,
    )
