"""CLIPScore: does the picture show what the prompt says, by OpenAI's CLIP ViT-L/14.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; scaled and
interpolated as in NVlabs/DiffusionNFT, 24af555. Hessel et al. 2021, who named it, take `2.5 · max(cos, 0)` of ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.clip import ClipReward
from marble.rewards.images import Method
from marble.rewards.model import Dtype

SOURCE = "openai/clip-vit-large-patch14"


class CLIPScore(ClipReward):
    """`exp(logit_scale) · cos / 100` of image and prompt, which is the cosine for OpenAI's weights."""

    name = "clipscore"
    about = "learned: does it show what the prompt says; CLIP ViT-L/14, cosine, about 0.15 to 0.35"
    facts = Facts(
        model=SOURCE,
        preprocessing="shorter side to 224 pixels (bilinear, or bicubic as its own processor has it), centre square, "
        "CLIP's mean and deviation; the prompt's first 75 tokens",
        scale="exp(logit_scale) · cosine / 100, in −1 to 1; 0.1 or 0.15 for a wrong prompt, seldom over 0.35",
        applies="every prompt, in English",
        licence="MIT",
        hacks="counts words, not grammar: who does what, where things stand and how many there are hardly matter; the "
        "prompt written into the picture raises it; blind to what lies outside the centre square",
    )

    def __init__(
        self,
        *,
        source: str = SOURCE,
        revision: str | None = None,
        processor: str | None = None,
        interpolation: Method = "bilinear",
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """From published weights.

        Args:
            source: hub repository or folder of a CLIP.
            revision: branch, tag or commit on the hub, of `source`.
            processor: hub repository or folder of tokenizer and preprocessing, if not `source`.
            interpolation: of the resize: bilinear as published rewards have it, bicubic as CLIP was trained.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of the network; features and scores are always in single precision.
        """
        super().__init__(source=source, revision=revision, processor=processor, device=device, dtype=dtype)
        self.interpolation: Method = interpolation

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32."""
        pixels = self.parts.preprocessing(images, self.interpolation)
        return self.parts.scale * self.cosines(pixels, [record.text for record in records]) / 100
