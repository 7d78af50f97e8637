"""Recent families and videos that differ from those before: packed frames, schedulers of their own, time upwards."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from . import text, vaes
from .families import SIZE, TOKENS
from .weights import redraw

_LATENT = SIZE // vaes.FACTOR
_THREE = 3  # blocks of an autoencoder that halves twice


def flux2_klein() -> Any:
    """Texts are states of several layers side by side; positions of images and texts are one row an image."""
    tokenizer = text.qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        transformer=redraw(
            diffusers.Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=2 * text.WIDTH,
                timestep_guidance_channels=16,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=redraw(
            diffusers.AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * _THREE,
                up_block_types=("UpDecoderBlock2D",) * _THREE,
                block_out_channels=(8,) * _THREE,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=SIZE,
                mid_block_add_attention=False,
            )
        ),
        text_encoder=redraw(transformers.Qwen3ForCausalLM(text.qwen3(tokenizer).config)),
        tokenizer=tokenizer,
        is_distilled=False,
    )


def chroma() -> Any:
    """FLUX without its guidance and pooled text, with a mask over text and image."""
    tokenizer = text.t5_tokenizer()
    return diffusers.ChromaPipeline(
        transformer=redraw(
            diffusers.ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=text.WIDTH,
                axes_dims_rope=(2, 2, 4),
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vaes.kl(quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.t5(tokenizer),
        tokenizer=tokenizer,
    )


def ltx() -> Any:
    """Frames packed into one row of tokens, and masks handed out in the wrong order."""
    tokenizer = text.t5_tokenizer()
    return diffusers.LTXPipeline(
        transformer=redraw(
            diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=text.WIDTH,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=redraw(
            diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
                spatio_temporal_scaling=(True, True, False, False),
                decoder_spatio_temporal_scaling=(True, True, False, False),
                patch_size=1,
            )
        ),
        text_encoder=text.t5(tokenizer),
        tokenizer=tokenizer,
    )


def cogvideox() -> Any:
    """Makes one video a prompt, however many are wanted, and tells its scheduler of the step before."""
    tokenizer = text.t5_tokenizer()
    return diffusers.CogVideoXPipeline(
        transformer=redraw(
            diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=16,
                text_embed_dim=text.WIDTH,
                num_layers=1,
                sample_width=_LATENT,
                sample_height=_LATENT,
                sample_frames=5,
                max_text_seq_length=TOKENS,
                use_rotary_positional_embeddings=True,
            )
        ),
        scheduler=diffusers.CogVideoXDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
        vae=redraw(
            diffusers.AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * _THREE,
                up_block_types=("CogVideoXUpBlock3D",) * _THREE,
                block_out_channels=(8,) * _THREE,
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                sample_height=SIZE,
                sample_width=SIZE,
            )
        ),
        text_encoder=text.t5(tokenizer),
        tokenizer=tokenizer,
    )


def mochi() -> Any:
    """Time and sigmas run upwards, and the network predicts what the others do, turned around."""
    tokenizer = text.t5_tokenizer()
    return diffusers.MochiPipeline(
        transformer=redraw(
            diffusers.MochiTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=8,
                num_layers=2,
                pooled_projection_dim=16,
                text_embed_dim=text.WIDTH,
                time_embed_dim=16,
                max_sequence_length=TOKENS,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=redraw(
            diffusers.AutoencoderKLMochi(
                encoder_block_out_channels=(32, 32, 32, 32),
                decoder_block_out_channels=(32, 32, 32, 32),
                layers_per_block=(1, 1, 1, 1, 1),
            )
        ),
        text_encoder=text.t5(tokenizer),
        tokenizer=tokenizer,
    )


CALLS: dict[str, dict[str, Any]] = {
    "flux2_klein": {"max_sequence_length": TOKENS, "text_encoder_out_layers": (1, 2)},
    "chroma": {"max_sequence_length": TOKENS},
    "ltx": {"num_frames": 5, "max_sequence_length": TOKENS},
    "cogvideox": {"num_frames": 5, "max_sequence_length": TOKENS},  # a VAE of one frame a latent makes it 8
    "mochi": {"num_frames": 7, "max_sequence_length": TOKENS},
}
"""What their calls need."""
