"""PickScore: CLIP ViT-H-14 tuned on what people picked out of two pictures.

Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"; divided by
26 as NVlabs/DiffusionNFT, 24af555, does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.clip import ClipReward
from marble.rewards.model import Dtype

SOURCE, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FULL = 26
"""What the score is divided by; tables in papers show it without."""


class PickScore(ClipReward):
    """`exp(logit_scale) · cos / 26` of image and prompt."""

    name = "pickscore"
    about = "learned: which picture people pick for this prompt; CLIP ViT-H-14, about 0.7 to 0.9 (papers show it × 26)"
    facts = Facts(
        model=f"{SOURCE}, with the tokenizer and preprocessing of {PROCESSOR}",
        preprocessing="shorter side to 224 pixels (bicubic, as PIL), centre square, CLIP's mean and deviation; the "
        "prompt's first 75 tokens",
        scale="exp(logit_scale) · cosine / 26, no bounds in practice; most pictures 0.7 to 0.9, those of one prompt a "
        "few hundredths apart",
        applies="every prompt, in English",
        licence="none named on the model card; the authors' code is MIT",
        hacks="learnt from users of a few models of 2022 and 2023: saturated colours, high contrast, smooth, centred "
        "subjects and more detail than asked for; blind to what lies outside the centre square and to small text",
    )

    def __init__(
        self,
        *,
        source: str = SOURCE,
        revision: str | None = None,
        processor: str | None = None,
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """From published weights.

        Args:
            source: hub repository or folder of a CLIP.
            revision: branch, tag or commit on the hub, of `source`.
            processor: hub repository or folder of tokenizer and preprocessing; if not given, that of the published
                weights, or `source` where that is another.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of the network; features and scores are always in single precision.
        """
        processor = processor or (PROCESSOR if source == SOURCE else source)
        super().__init__(source=source, revision=revision, processor=processor, device=device, dtype=dtype)

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32."""
        texts = [record.text for record in records]
        return self.parts.scale * self.cosines(self.parts.preprocessing(images), texts) / FULL
