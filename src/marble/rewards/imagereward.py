"""ImageReward: how much people would like a picture for its prompt, learnt from 137 000 comparisons by experts.

Source: Xu et al. 2023, "ImageReward: Learning and evaluating human preferences for text-to-image generation"; the
published code (THUDM/ImageReward, 0f5fa3e) says the rest: `ImageReward/ImageReward.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marble.errors import MarbleError, first_line
from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.checkpoint import fetch, load_into, materialise, read_state, weights_revision
from marble.rewards.clip import OPENAI_MEAN, OPENAI_STD
from marble.rewards.head import LinearHead
from marble.rewards.images import center_crop, normalise, resize_shortest
from marble.rewards.model import Dtype, ModelReward

SOURCE, WEIGHTS, MED = "THUDM/ImageReward", "ImageReward.pt", "med_config.json"
LENGTH = 35
"""Tokens of a prompt with [CLS] and [SEP]; shorter ones are padded, longer ones cut."""
CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores, by which the published ones have mean 0 and standard deviation 1."""


class ImageReward(ModelReward):
    """BLIP's image-grounded text encoder, its [CLS] through five linear layers, normalised: about −2 to 2."""

    name = "imagereward"
    about = "learned: would people prefer it for this prompt; BLIP with a linear head, about −2 to 2"
    facts = Facts(
        model=f"{SOURCE} ({WEIGHTS} and {MED}), tokenizer bert-base-uncased",
        preprocessing="shorter side to 224 pixels (bicubic, as Pillow), centre square, CLIP's mean and deviation; the "
        "prompt's first 33 tokens",
        scale="mean 0, standard deviation 1 in its authors' data; 98% of Stable Diffusion 1.4's pictures in −2 to 2",
        applies="every prompt; learnt from English ones",
        licence="Apache-2.0",
        hacks="blind to what lies outside the centre square, to detail lost at 224 pixels and to the prompt after 33 "
        "tokens; its authors, who tune models on it directly, stop rewarding at 2; alone it is known to pull pictures "
        "towards one glossy, saturated look",
    )

    def __init__(
        self,
        *,
        source: str = SOURCE,
        revision: str | None = None,
        tokenizer: str = "bert-base-uncased",
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """From published weights.

        Args:
            source: hub repository or folder with `ImageReward.pt` and `med_config.json`, or the first of them.
            revision: branch, tag or commit on the hub.
            tokenizer: hub repository or folder of the BERT tokenizer, without or with the two tokens that BLIP adds.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of BLIP; the head always runs in single precision.
        """
        super().__init__(device=device, dtype=dtype)
        self.source, self.tokenizer, self._asked = source, tokenizer, revision
        self.revision = f"{source}@{revision or 'main'}"

    def load(self) -> _Parts:
        """Network and tokenizer; `revision` then says which commit, or the hash of a local file.

        Raises:
            MarbleError: they cannot be had, or do not fit together.
        """
        parts = _load(self.source, self._asked, self.tokenizer, self.device, self.dtype)
        self.revision = parts.revision
        return parts

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32."""
        net = self.parts.net
        square = (net.blip.image_size, net.blip.image_size)
        pixels = center_crop(resize_shortest(images, square[0], "bicubic"), square, halves="even")
        tokens = self.parts.tokenizer(
            [record.text for record in records],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        ).to(images.device)
        raw = net(normalise(pixels, OPENAI_MEAN, OPENAI_STD).to(self.dtype), tokens.input_ids, tokens.attention_mask)
        return (raw - CENTRE) / SPREAD


class _Net(nn.Module):
    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.blip, self.mlp = blip, LinearHead(blip.text_encoder.config.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """`[N]` raw scores, float32."""
        return self.mlp(self.blip(pixels, ids, mask)[:, 0].float())


@dataclass(frozen=True)
class _Parts:
    net: Any
    tokenizer: Any
    revision: str


@functools.cache
def _load(source: str, revision: str | None, tokenizer: str, device: torch.device, dtype: torch.dtype) -> _Parts:
    from marble.rewards.blip import BLIP, renamed

    file = fetch(source, WEIGHTS, revision)
    beside = str(file.parent) if Path(source).expanduser().is_file() else source
    words, what = _tokenizer(tokenizer), f'"{file}"'
    state = read_state(file)
    inner = renamed({key.removeprefix("blip."): value for key, value in state.items() if key.startswith("blip.")})
    outer = {key: value for key, value in state.items() if not key.startswith("blip.")}
    with torch.device("meta"):  # random weights would take longer than reading the real ones
        net = _Net(BLIP(inner, _med(fetch(beside, MED, revision)), what))
    known = net.blip.text_encoder.config.vocab_size
    if len(words) != known:
        raise MarbleError(
            f'settings.tokenizer: "{tokenizer}" has {len(words)} tokens with BLIP\'s two, but {what} knows {known}'
        )
    load_into(materialise(net), {f"blip.{key}": value for key, value in inner.items()} | outer, what)
    net.blip.to(device, dtype)
    net.mlp.to(device)
    return _Parts(net.eval().requires_grad_(False), words, weights_revision(source, file))


def _tokenizer(source: str) -> Any:
    """BERT's, with the two tokens that BLIP adds."""
    from transformers import BertTokenizer

    try:
        words = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise MarbleError(f'settings.tokenizer: cannot get "{source}": {first_line(error)}') from error
    words.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return words


def _med(file: Path) -> dict[str, Any]:
    try:
        med = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MarbleError(f'"{file}" is no JSON: {error}') from error
    if not isinstance(med, dict):
        raise MarbleError(f'"{file}" must hold an object with num_attention_heads, got {type(med).__name__}')
    return med
