"""Character-level tokenizers and tiny text encoders with random weights; texts that differ are told apart."""

from __future__ import annotations

import string
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from .weights import redraw

WIDTH = 32
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
_START, _END = "<|startoftext|>", "<|endoftext|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One token a word, as the real tokenizer has it: QwenImage cuts exactly 34 tokens of instruction off its states.
# fmt: off
_QWEN_WORDS = [
    "system", "user", "assistant", "Describe", " the", " image", " by", " detailing", " color", " shape",
    " size", " texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and",
    " background",
]
# fmt: on


def clip_tokenizer(pad_token: str = _END) -> Any:
    """77 tokens, a letter each."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77, pad_token=pad_token
    )


def clip(tokenizer: Any, *, projection: bool = False) -> Any:
    """CLIP's text model, `WIDTH` wide; its pooled output is as wide."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return redraw(kind(config))


def t5_tokenizer() -> Any:
    """A letter a token."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in _CHARACTERS)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def t5(tokenizer: Any, width: int = WIDTH, kind: str = "T5") -> Any:
    """The encoder of T5 or, by `kind`, UMT5."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return redraw(getattr(transformers, f"{kind}EncoderModel")(config))


def _start_with(tokenizer: Any, token: str) -> Any:
    """Put a token before every text, so that the empty one has a token too."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )
    return tokenizer


def gemma_tokenizer() -> Any:
    """A letter a token, after a token of beginning."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *_CHARACTERS]
    tokenizer = transformers.GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    return _start_with(tokenizer, "<bos>")


def gemma(tokenizer: Any) -> Any:
    """Gemma 2 without its head."""
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=512,
    )
    return redraw(transformers.Gemma2Model(config))


def qwen_tokenizer(**options: Any) -> Any:
    """A letter a token, but the words of QwenImage's instruction whole, and a chat template."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], **options)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(_QWEN_WORDS)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def qwen_vl(tokenizer: Any) -> Any:
    """Qwen2.5-VL, which QwenImage uses for text alone: its eyes are as small as can be."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return redraw(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3(tokenizer: Any) -> Any:
    """Qwen 3 without its head, of which ZImage uses the states before the last layer."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return redraw(transformers.Qwen3Model(config))


def glm_tokenizer() -> Any:
    """A letter a token, after a token of beginning; padded on its left."""
    return _start_with(qwen_tokenizer(padding_side="left"), "<|im_start|>")


def glm(tokenizer: Any) -> Any:
    """GLM without its head, of which CogView4 uses the states before the last layer."""
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    return redraw(transformers.GlmModel(config))


def bert_tokenizer() -> Any:
    """A letter a token."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters, *("##" + c for c in letters)]
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)


def bert(tokenizer: Any) -> Any:
    """BERT, which HunyuanDiT uses in CLIP's place."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
    )
    return redraw(transformers.BertModel(config))
