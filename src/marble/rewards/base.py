"""The contract of a reward, and the table that several of them fill in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from marble.prompts import Record

WHERE = ("url", "timeout", "workers", "retries", "answer_within", "key_variable", "token_variable", "device", "threads")
"""Settings of rewards that change where and how long they judge, not what."""


@dataclass(frozen=True)
class Facts:
    """What to know of a reward before trusting a model to it; `marble list rewards` shows it."""

    model: str
    """Hub id of what scores, or `none` for a closed form."""
    preprocessing: str
    scale: str
    """What the number is, its range, and how far it spreads."""
    applies: str
    """Which prompts it can judge."""
    licence: str
    """Of the weights."""
    hacks: str
    """What is known to raise it without making better pictures."""


class Reward:
    """Base of all rewards: higher is better, the scale is the reward's own.

    A subclass sets `name` and writes `score`; it overrides `applies` if it cannot judge every prompt. Its constructor's
    keyword arguments are its settings in a config, checked against their annotations. Models are loaded in `prepare`
    or on first use, not when the object is made.
    """

    name: str
    groupwise: bool = False
    """Whether `score` judges the images of one prompt together (it is then called once a group)."""
    judges_videos: bool = False
    """Whether videos come whole, `[N, F, 3, H, W]`; otherwise their frames do, as pictures, and the mean counts."""
    needs_prompt: bool = True
    """Whether what it says depends on the prompt or its targets."""
    wants_floats: bool = False
    """Images come as uint8 so that local and remote scores agree; set this to get floats in [0, 1]."""
    revision: str = ""
    """What exactly scored: a model's revision, a world's version. Written into `evaluation.json`."""
    accuracy_above: float | None = None
    """The score from which an image counts as right, where images can be; accuracy is the share of those that do."""
    about: str = ""
    """One line for `marble list rewards`."""
    facts: Facts | None = None
    origin: str = ""
    """What the config called it: a registered name, `package.module:attribute`, or a URL."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """As the config had them."""
    prepared: bool = False
    """Whether `prepare` has been called."""
    cached: bool = False
    """Whether evaluation may take a score from an earlier one of the same image and prompt; needs `revision`."""

    batch: int = 64
    """Images given to `score` at a time, in this order whatever the rollout's batches; groups are never split."""
    workers: int = 0
    """Threads in which it judges beside the sampling of the next images; 0: after the sampling."""
    timeout: float = 600.0
    """Seconds that one portion may take, all frames of its videos included; after that its scores are missing."""

    def applies(self, record: Record) -> bool:
        """Whether this reward can judge pictures of `record`. Where it cannot, the score is missing, not zero."""
        return True

    def applies_to(self, records: Sequence[Record]) -> list[bool]:
        """`applies` of many, `[N]`."""
        return [self.applies(record) for record in records]

    def check(self) -> None:
        """Find out cheaply whether it could score: what is installed, settings that exclude each other.

        Raises:
            MarbleError: it could not, and what to do.
        """

    def prepare(self) -> None:
        """Load what scoring needs; called once before a run, so that what is missing is found before anything is made.

        Raises:
            MarbleError: it cannot be had.
        """

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """Judge pictures.

        Args:
            images: `[N, 3, H, W]`, uint8 (or float in [0, 1], see `wants_floats`); `[N, F, 3, H, W]` are videos (see
                `judges_videos`). On the CPU.
            records: `[N]`, the prompts they were made from; all apply.

        Returns:
            `[N]`, higher is better; NaN where a score could not be had. An exception makes all N missing; the run goes
            on, with a warning.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RewardTable:
    """Scores of N images by K rewards; `scores` is NaN wherever `applies` is false."""

    names: list[str]  # [K]
    scores: Tensor  # [N, K] float64
    applies: Tensor  # [N, K] bool: there is a score
    judgeable: Tensor | None = None  # [N, K] bool: the reward can judge the image's prompt; as `applies`, if not given

    @classmethod
    def of(cls, names: Sequence[str], scores: Tensor, wanted: Tensor) -> RewardTable:
        """A table in which what was `wanted` `[N, K]` and has no score is missing."""
        return cls(list(names), scores, ~scores.isnan(), wanted)

    @property
    def wanted(self) -> Tensor:
        """`[N, K]` bool: there should be a score."""
        return self.applies if self.judgeable is None else self.judgeable

    @property
    def missing(self) -> Tensor:
        """`[K]` int64: images that a reward should have judged and gave no score for."""
        return (self.wanted & ~self.applies).sum(dim=0)

    def metrics(self) -> dict[str, Any]:
        """Mean score by reward (None if there is no score), and how many images each did not answer for, if any."""
        means = self.scores.nanmean(dim=0).tolist()
        rows: dict[str, Any] = {
            "reward": {name: None if mean != mean else mean for name, mean in zip(self.names, means, strict=True)}
        }
        absent = {name: count for name, count in zip(self.names, self.missing.tolist(), strict=True) if count}
        return rows | ({"missing": absent} if absent else {})

    @property
    def silent(self) -> list[str]:
        """Rewards that should have judged images and gave no score for any of them."""
        return [
            name
            for name, wanted, missing in zip(self.names, self.wanted.sum(dim=0), self.missing, strict=True)
            if 0 < wanted == missing
        ]
