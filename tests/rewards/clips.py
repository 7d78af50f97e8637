"""Tiny CLIPs and what goes with them, in every format that rewards are published in."""

import math

import torch
from tokenizers.pre_tokenizers import ByteLevel

SIDE, PATCH, FEATURES, TOKENS = 32, 8, 48, 77
LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def save_tokenizer(folder):
    """Of letters."""
    from transformers import CLIPTokenizer

    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS).save_pretrained(folder)
    return folder


def save_preprocessing(folder, side=SIDE, **settings):
    from transformers import CLIPImageProcessorPil

    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(**{"size": {"shortest_edge": side}, "crop_size": crop, **settings}).save_pretrained(folder)
    return folder


def redraw(network, seed):
    """Weights large enough for features to differ between images and between texts; a logit scale of 100."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights.copy_(centre + 0.15 * torch.randn(weights.shape, generator=generator))
        if hasattr(network, "logit_scale"):
            network.logit_scale.fill_(math.log(100))
    return network


def save_clip(folder, seed=0, *, end=END, **weights):
    """A folder as transformers saves it, with tokenizer and preprocessing."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    words = {"vocab_size": len(VOCABULARY), "max_position_embeddings": TOKENS, "bos_token_id": START}
    words |= {"eos_token_id": end, "pad_token_id": END}
    config = CLIPConfig(
        vision_config=tower | {"hidden_size": 40, "intermediate_size": 80, "image_size": SIDE, "patch_size": PATCH},
        text_config=tower | words | {"hidden_size": 32, "intermediate_size": 64},
        projection_dim=FEATURES,
    )
    redraw(CLIPModel(config), seed).save_pretrained(folder, **weights)
    return save_preprocessing(save_tokenizer(folder))


def open_clip_state(seed=0, *, width=64, text_width=32):
    """The tensors of a CLIP of open_clip with two layers a tower, as ViT-H-14 names them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, centre=0.0):
        return centre + 0.15 * torch.randn(shape, generator=generator)

    def norm(name, size):
        return {f"{name}.weight": drawn(size, centre=1.0), f"{name}.bias": drawn(size)}

    def linear(name, out, into):
        return {f"{name}.weight": drawn(out, into), f"{name}.bias": drawn(out)}

    def tower(prefix, size):
        state = {}
        for at in range(2):
            block = f"{prefix}transformer.resblocks.{at}."
            state |= norm(f"{block}ln_1", size)
            state |= {
                f"{block}attn.in_proj_weight": drawn(3 * size, size),
                f"{block}attn.in_proj_bias": drawn(3 * size),
            }
            state |= linear(f"{block}attn.out_proj", size, size) | norm(f"{block}ln_2", size)
            state |= linear(f"{block}mlp.c_fc", 4 * size, size) | linear(f"{block}mlp.c_proj", size, 4 * size)
        return state

    return {
        "positional_embedding": drawn(TOKENS, text_width),
        "text_projection": drawn(text_width, FEATURES),
        "logit_scale": torch.tensor(math.log(100)),
        "visual.class_embedding": drawn(width),
        "visual.positional_embedding": drawn((SIDE // PATCH) ** 2 + 1, width),
        "visual.proj": drawn(width, FEATURES),
        "visual.conv1.weight": drawn(width, 3, PATCH, PATCH),
        **norm("visual.ln_pre", width),
        **tower("visual.", width),
        **norm("visual.ln_post", width),
        **tower("", text_width),
        "token_embedding.weight": drawn(len(VOCABULARY), text_width),
        **norm("ln_final", text_width),
    }


def head_state(seed=0, features=FEATURES):
    """The tensors of LAION's aesthetic head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [features, 1024, 128, 64, 16, 1]
    state = {}
    for at, into, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        state[f"layers.{at}.weight"] = torch.randn(out, into, generator=generator) / math.sqrt(into)
        state[f"layers.{at}.bias"] = torch.randn(out, generator=generator)
    return state


def pictures(count, height, width, seed=0):
    """`[N, 3, H, W]` uint8: waves of all sizes and colours, one picture grey, with noise."""
    generator = torch.Generator().manual_seed(seed)
    down, across = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.rand(count, 3, 3, 1, 1, generator=generator) * 12
    images = torch.sin(waves[:, :, 0] * down + waves[:, :, 1] * across + waves[:, :, 2])
    images = images + 0.2 * torch.randn(images.shape, generator=generator)
    images[-1] = images[-1, :1]
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
