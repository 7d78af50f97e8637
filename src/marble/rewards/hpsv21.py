"""HPSv2.1: CLIP ViT-H-14 tuned on 798 000 choices between pictures for a prompt.

Source: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis"; `hpsv2/img_score.py` of tgxs002/HPSv2. The published code runs in mixed precision.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence

import torch
from torch import Tensor

from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.checkpoint import fetch, read_state, weights_revision
from marble.rewards.clip import (
    OPENAI_MEAN,
    OPENAI_STD,
    Clip,
    ClipReward,
    check_tokenizer,
    load_tokenizer,
    named,
    settle,
)
from marble.rewards.images import fit_longest, normalise
from marble.rewards.model import Dtype
from marble.rewards.open_clip import from_open_clip

SOURCE, WEIGHTS, PROCESSOR = "xswu/HPSv2", "HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv21(ClipReward):
    """The cosine of image and prompt."""

    name = "hpsv21"
    about = "learned: which picture people prefer for this prompt; CLIP ViT-H-14, cosine, about 0.2 to 0.35"
    facts = Facts(
        model=f"{SOURCE} ({WEIGHTS}), with the tokenizer of {PROCESSOR}",
        preprocessing="longer side to 224 pixels (bicubic, as PIL), black bars, CLIP's mean and deviation; the "
        "prompt's first 75 tokens",
        scale="cosine, in −1 to 1; most pictures 0.2 to 0.35, those of one prompt a few hundredths apart",
        applies="every prompt, in English",
        licence="Apache-2.0",
        hacks="drifts towards one glossy, bright, over-detailed look when nothing else is rewarded; small on what the "
        "prompt asks for in particular; blind to detail lost at 224 pixels",
    )

    def __init__(
        self,
        *,
        source: str = SOURCE,
        revision: str | None = None,
        processor: str = PROCESSOR,
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """From published weights.

        Args:
            source: hub repository or folder with `HPS_v2.1_compressed.pt`, or such a file: a ViT-H-14 of open_clip.
            revision: branch, tag or commit on the hub, of `source`.
            processor: hub repository or folder of the tokenizer.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of the network; features and scores are always in single precision.
        """
        super().__init__(source=source, revision=revision, processor=processor, device=device, dtype=dtype)

    def load(self) -> Clip:
        """The network; `revision` then says which commit, or the hash of a local file.

        Raises:
            MarbleError: it cannot be had.
        """
        clip = _load(self.source, self.asked, self.processor, self.device, self.dtype)
        self.revision = clip.revision
        return clip

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32."""
        texts = [html.unescape(html.unescape(record.text)) for record in records]  # as the tokenizer of open_clip does
        return self.cosines(self.parts.preprocessing(images), texts)


@functools.cache
def _load(source: str, revision: str | None, processor: str, device: torch.device, dtype: torch.dtype) -> Clip:
    settings = "settings"
    file = named(f"{settings}.source", fetch, source, WEIGHTS, revision)
    state = named(f"{settings}.source", read_state, file, "state_dict")
    network = named(f"{settings}.source", from_open_clip, state, f'"{file}"')
    tokenizer = named(f"{settings}.processor", load_tokenizer, processor)
    check_tokenizer(tokenizer, network, f'{settings}.processor: the tokenizer of "{processor}"')
    preprocessing = functools.partial(_framed, size=network.config.vision_config.image_size)
    return Clip(settle(network, device, dtype), weights_revision(source, file), preprocessing, tokenizer)


def _framed(images: Tensor, size: int) -> Tensor:
    return normalise(fit_longest(images, size, "bicubic"), OPENAI_MEAN, OPENAI_STD)
