"""Builds the empty parts of the miniature Stable Diffusion 3: all stock classes of Diffusers and Transformers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from marble.mini.world import World

LATENT_CHANNELS = 8
CONTEXT_TOKENS = 16
"""Caption tokens, start and end included; longer captions are cut."""
JOINT_DIM = 128
WIDTH = 128
LAYERS = 4
HEADS = 4
_T5_VOCABULARY = 97  # room for every printable character, should it ever speak
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(world: World, pad_token: str) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that reads every word of the grammar as one token and any other letter by letter.

    Every merge is anchored at a word's end ("e d</w>", then "r ed</w>"), so in any word at most one merge
    applies at a time and no grammar word can disturb another. Two-letter words stay letters: merged, they
    would swallow the ends of words to be spelled.
    """
    letters = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges: Any = []  # of pairs, which the annotations upstream do not know
    for word in world.grammar_words:
        if len(word) < 3:
            continue
        tail = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if (letter, tail) not in merges:
                merges.append((letter, tail))
            tail = letter + tail
            vocab.setdefault(tail, len(vocab))
    for token in (_START, _END):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_TOKENS, pad_token=pad_token)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A small CLIP text model whose penultimate states and pooled projection SD3 uses."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=CONTEXT_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_blank_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that says nothing: its output is zero, which is what SD3 is given when T5 is left out.

    It is here because a stock `from_pretrained` wants every part of the pipeline to be present.
    """
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    config = T5Config(vocab_size=_T5_VOCABULARY, d_model=JOINT_DIM, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model, tokenizer


def build_vae(size: int) -> AutoencoderKL:
    """Pixels `[N, 3, S, S]` ↔ latents `[N, 8, S/4, S/4]`."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=size,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_pipeline(world: World, seed: int) -> Any:
    """The whole pipeline with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = build_tokenizer(world, pad_token=_END)
        second = build_tokenizer(world, pad_token="!")
        t5, t5_tokenizer = build_blank_t5()
        transformer = SD3Transformer2DModel(
            sample_size=world.size // 4,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=JOINT_DIM,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=128,
            pos_embed_max_size=world.size // 8,
            qk_norm="rms_norm",
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
            vae=build_vae(world.size),
            text_encoder=build_text_encoder(first, 96, 3),
            tokenizer=first,
            text_encoder_2=build_text_encoder(second, 32, 2),
            tokenizer_2=second,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
