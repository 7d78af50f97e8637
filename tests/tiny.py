"""Tiny diffusers denoisers with random weights, a LoRA for each, random inputs, and a loss on their outputs.

The real classes of five model families, built locally: under 1M parameters and under 0.1 s for four samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marble import AffineLoss, nft_loss

MODELS = ("sd3", "flux", "unet", "sana", "wan")

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_JOINT = [*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# Beside attention: feed-forward layers, and layers that see `[N, C]` instead of `[N, tokens, C]`.
LINEARS = {
    "sd3": [*_JOINT, "ff.net.0.proj", "ff.net.2", "norm1.linear"],
    "flux": [*_JOINT, "proj_mlp", "proj_out", "norm1.linear", "timestep_embedder.linear_1"],
    "unet": [*_ATTENTION, "ff.net.0.proj", "ff.net.2", "time_emb_proj"],
    "sana": _ATTENTION,
    "wan": [*_ATTENTION, "ffn.net.0.proj", "ffn.net.2"],
}


def build(name: str, seed: int = 0) -> nn.Module:
    """One of `MODELS`, frozen and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name]().requires_grad_(False).eval()


def add_lora(model: nn.Module, targets: list[str], *, seed: int = 1, rank: int = 3, **options: object) -> nn.Module:
    """Put a LoRA on the layers whose names end so; both of its factors are random, so no gradient is zero.

    Args:
        model: a diffusers model.
        targets: endings of layers' names.
        seed: of the factors.
        rank: of the factors.
        options: of PEFT's `LoraConfig`, such as `use_rslora` and `use_dora`.
    """
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, **options)
        )
    return model


def inputs_of(name: str, count: int, seed: int = 2) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward for `count` samples, each at a timestep of its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    time = torch.rand(count, generator=generator) * 0.8 + 0.1
    if name == "sd3":
        return {
            "hidden_states": random(4, 8, 8),
            "encoder_hidden_states": random(5, 24),
            "pooled_projections": random(20),
            "timestep": time * 1000,
        }
    if name == "flux":
        grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1)
        return {
            "hidden_states": random(16, 8),
            "encoder_hidden_states": random(5, 24),
            "pooled_projections": random(20),
            "timestep": time,
            "guidance": time * 4,
            "img_ids": nn.functional.pad(grid.reshape(16, 2), (1, 0)),
            "txt_ids": torch.zeros(5, 3),
        }
    if name == "unet":
        return {
            "sample": random(4, 8, 8),
            "timestep": (time * 1000).long(),
            "encoder_hidden_states": random(5, 24),
        }
    if name == "sana":
        return {
            "hidden_states": random(4, 6, 6),
            "encoder_hidden_states": random(5, 24),
            "timestep": time * 1000,
            "encoder_attention_mask": (torch.arange(5) < 3 + torch.arange(count)[:, None] % 3).long(),
        }
    return {
        "hidden_states": random(4, 3, 4, 4),
        "encoder_hidden_states": random(5, 24),
        "timestep": (time * 1000).long(),
    }


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output `[N, …]`."""
    return model(**inputs, return_dict=False)[0]


def loss_of(output: Tensor, seed: int = 3) -> AffineLoss:
    """DiffusionNFT's loss with everything but the model's output `[N, …]` random; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    output = output.float() if output.dtype == torch.bfloat16 else output
    x_t, x0, step = (torch.randn(output.shape, generator=generator).to(output) for _ in range(3))
    sigma = torch.rand(len(output), *[1] * (output.ndim - 1), generator=generator).to(output) * 0.8 + 0.1
    x0_theta = x_t - sigma * output
    return nft_loss(x0, x0_theta, x0_theta.detach() + 0.1 * step, beta=0.5, amax=5.0)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    )


def _sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=6,
    )


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=16,
    )


_BUILDERS = {"sd3": _sd3, "flux": _flux, "unet": _unet, "sana": _sana, "wan": _wan}
