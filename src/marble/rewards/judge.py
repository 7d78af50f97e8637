"""Vision-language models as judges: asked about one picture at a time, behind an OpenAI-compatible endpoint.

vLLM and SGLang serve such endpoints, and so do companies. What the model writes is searched for a number; where there
is none, the score is missing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from PIL import Image
from torch import Tensor

from marble.errors import MarbleError, nearest
from marble.prompts import Record
from marble.rewards.base import Facts, Reward
from marble.rewards.http import RefusedError, Server, UnansweredError, ask, check_url, warn_if_open
from marble.rewards.wire import to_png

TEMPLATE = """Caption: {prompt}

Judge this image. Does it show what the caption says, everything and nothing else, and is it well made?
Answer with one line, "Score: N", where N is a whole number from 1 (not at all) to 10 (perfectly)."""

UNIFIED_REWARD = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
"""What the model is asked in the runs that published its scores, word for word, without which ours would be others
(yifan123/flow_grpo 54809b5, `flow_grpo/rewards.py`, after CodeGoat24/UnifiedReward's own)."""


class Judge(Reward):
    """Any vision-language model that answers with a number."""

    name = "judge"
    about = "a vision-language model behind an OpenAI-compatible endpoint, asked for a number"
    facts = Facts(
        model="settings.model, behind the endpoint at settings.url",
        preprocessing="the picture as a PNG, made smaller only if settings.size says so; then settings.template with "
        "the prompt; temperature 0",
        scale="what settings.pattern finds in the answer, over settings.divide_by; by default 0.1 to 1 in tenths, so "
        "many pictures of a prompt share a score",
        applies="every prompt",
        licence="the model's, or the terms of whoever serves it",
        hacks="writing in the picture that praises it or states a score; oversaturated, busy pictures. Few levels, so "
        "a group of equal scores teaches nothing",
    )
    cached = True
    batch = 1  # a picture is a question of its own: one that fails is missing alone
    workers = 8  # questions under way

    def __init__(
        self,
        *,
        model: str,
        url: str = "http://127.0.0.1:8000/v1",
        template: str = TEMPLATE,
        pattern: str = r"Score:\W*(\d+(?:\.\d+)?)",
        divide_by: float = 10.0,
        size: int | None = None,
        square: bool = False,
        max_tokens: int = 512,
        key_variable: str | None = None,
        retries: int = 3,
        answer_within: float | None = None,
    ) -> None:
        """Of an endpoint.

        Args:
            model: as the endpoint calls it.
            url: up to and with `/v1`.
            template: the question, with `{prompt}` where the prompt goes.
            pattern: regular expression with one group, the number; its first match counts.
            divide_by: what the number is divided by.
            size: pixels of the longest side, larger pictures are made smaller; as it is, if not given.
            square: every picture is stretched to `size` × `size`.
            max_tokens: of the answer.
            key_variable: name of the environment variable with the endpoint's key.
            retries: how often a question is asked again that did not reach the endpoint or that it failed on, after
                growing pauses; a busy endpoint (429 or 503 with Retry-After) is asked until `timeout` is over.
            answer_within: seconds for one answer, after which the score is missing; what `timeout` leaves, if not
                given.

        Raises:
            MarbleError: a setting does not fit.
        """
        where = f"reward {self.name}: settings"
        if "{prompt}" not in template:
            raise MarbleError(f"{where}.template: must contain {{prompt}}, got {template!r}")
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise MarbleError(f"{where}.pattern: {pattern!r} is no regular expression: {error}") from error
        if self.pattern.groups != 1:
            raise MarbleError(f"{where}.pattern: must have one group, the number; {pattern!r} does not")
        for field, value in (("divide_by", divide_by), ("max_tokens", max_tokens), ("answer_within", answer_within)):
            if value is not None and not 0 < value < math.inf:
                raise MarbleError(f"{where}.{field}: must be positive, got {value}")
        if size is not None and size < 1:
            raise MarbleError(f"{where}.size: must be at least 1, got {size}")
        if square and size is None:
            raise MarbleError(f"{where}.square: needs a size to stretch pictures to")
        if retries < 0:
            raise MarbleError(f"{where}.retries: must be at least 0, got {retries}")
        if not model:
            raise MarbleError(f"{where}.model: must name the model as the endpoint calls it")
        self.model, self.url, self.template, self.divide_by = model, check_url(url, f"{where}.url"), template, divide_by
        self.size, self.square, self.max_tokens, self.key_variable = size, square, max_tokens, key_variable
        self.retries, self.answer_within = retries, answer_within
        question = json.dumps([template, pattern, divide_by, size, square, max_tokens])
        self.revision = f"{model} asked {hashlib.sha256(question.encode()).hexdigest()[:8]}"
        self._server: Server | None = None
        self._prepared = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """See that the key is there, if one is needed; nothing is contacted.

        Raises:
            MarbleError: it is not.
        """
        self._key()

    def prepare(self) -> None:
        """Ask the endpoint for its models, once.

        Raises:
            MarbleError: it does not answer, or has no such model.
        """
        if self._prepared:
            return
        advice = {401: self._advice, 404: "; settings.url usually ends with /v1"}
        within = min(30.0, self.answer_within or self.timeout)
        try:
            served = ask(
                [self._connect()],
                "GET",
                "/models",
                read=_models,
                retries=min(self.retries, 1),
                within=within,
                advice=advice,
            )
        except UnansweredError as error:
            raise MarbleError(
                f"{error}; start an endpoint there, with vllm serve or sglang, or name another in settings.url"
            ) from error
        if self.model not in served:
            raise MarbleError(
                f'{self.url} has no model "{self.model}".{nearest(self.model, served)} '
                f"It has: {', '.join(served) or 'none'} (settings.model)"
            )
        self._prepared = True

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float64; NaN where the answer holds no number.

        Raises:
            MarbleError: no picture was answered for.
        """
        server = self._connect()
        problems: list[MarbleError] = []

        def one(image: Tensor, record: Record) -> float:
            try:
                return self._number(self._answer(server, image, record))
            except MarbleError as error:
                problems.append(error)
                return math.nan

        if len(images) == 1:  # as the run has it, whose own threads ask at once
            scores = [one(images[0], records[0])]
        else:
            with ThreadPoolExecutor(max(1, min(self.workers, len(images)))) as pool:
                scores = list(pool.map(one, images, records))
        if scores and len(problems) == len(scores):
            raise problems[0]
        return torch.tensor(scores, dtype=torch.float64)

    def _answer(self, server: Server, image: Tensor, record: Record) -> str:
        picture = "data:image/png;base64," + base64.b64encode(to_png(self._resized(image))).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self.template.replace("{prompt}", record.text)},
        ]
        message = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return ask(
            [server],
            "POST",
            "/chat/completions",
            json.dumps(message).encode(),
            read=_text,
            retries=self.retries,
            within=0.9 * self.timeout,
            answer_within=self.answer_within,
            advice={401: self._advice},
        )

    def _number(self, answer: str) -> float:
        match = self.pattern.search(answer)
        try:
            number = float(match[1]) if match and match[1] else math.nan
        except ValueError:
            return math.nan
        return number / self.divide_by if math.isfinite(number) else math.nan

    def _resized(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if self.size is None or (not self.square and max(height, width) <= self.size):
            return image
        shrink = self.size / max(height, width)
        size = (self.size,) * 2 if self.square else (max(1, round(width * shrink)), max(1, round(height * shrink)))
        import numpy as np

        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def _connect(self) -> Server:
        """The endpoint; connections are made on first use, as many as there are workers then."""
        with self._lock:
            if self._server is None:
                key = self._key()
                warn_if_open(self.url, key, self.key_variable)
                self._server = Server(self.url, token=key, connections=max(self.workers, 1))
            return self._server

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise MarbleError(f"settings.key_variable: the environment variable {self.key_variable} is not set")
        if not key.isascii() or not key.isprintable():
            raise MarbleError(f"settings.key_variable: the environment variable {self.key_variable} holds no key")
        return key

    @property
    def _advice(self) -> str:
        if self.key_variable is None:
            return "; settings.key_variable names the environment variable with its key"
        return f"; the key in {self.key_variable} is not right"


class UnifiedReward(Judge):
    """UnifiedReward, a vision-language model trained to give marks from 1 to 5."""

    name = "unifiedreward"
    about = "UnifiedReward-7b v1.5 behind an endpoint: alignment and quality, 0.2 to 1"
    facts = Facts(
        model="CodeGoat24/UnifiedReward-7b-v1.5 (LLaVA-OneVision), behind the endpoint at settings.url; sglang with "
        "--chat-template chatml-llava, in the published runs",
        preprocessing="stretched to 512 × 512 (bicubic), as a PNG; the question of the published runs; temperature 0",
        scale="a mark from 1 to 5 over 5; mostly whole or half marks, so many pictures of a prompt share a score. "
        "Published runs score an answer without a mark 0; here it is missing",
        applies="every prompt",
        licence="MIT",
        hacks="few levels, so a group of equal scores teaches nothing; writing in the picture that praises it; glossy, "
        "saturated pictures",
    )

    def __init__(
        self,
        *,
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        url: str = "http://127.0.0.1:8000/v1",
        max_tokens: int = 512,
        key_variable: str | None = None,
        retries: int = 3,
        answer_within: float | None = None,
    ) -> None:
        """As `Judge`, with the question, the pattern, the scale and the size of the published runs."""
        super().__init__(
            model=model,
            url=url,
            template=UNIFIED_REWARD,
            pattern=r"Final Score:\s*([1-4](?:\.\d+)?|5(?:\.0+)?)(?![\d.]*\d)",  # not the 1 of 10
            divide_by=5.0,
            size=512,
            square=True,
            max_tokens=max_tokens,
            key_variable=key_variable,
            retries=retries,
            answer_within=answer_within,
        )


def _text(response: httpx.Response) -> str:
    """What the model wrote; an empty string if nothing."""
    try:
        content: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise RefusedError(f"{response.url} answered in another form than OpenAI's") from error
    return content if isinstance(content, str) else ""


def _models(response: httpx.Response) -> list[str]:
    try:
        return [str(row["id"]) for row in response.json()["data"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{response.url} answered in another form than OpenAI's") from error
