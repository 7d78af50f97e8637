"""OCR: is the text in the picture that the prompt asks for, letter by letter, as RapidOCR reads it."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import PurePath
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record
from marble.rewards.base import Facts, Reward

_QUOTED = re.compile(r'["“]([^"“”]*)["”]')
_ROUND = frozenset("oq0cd689")
"""What rings and discs are read as, by twos at times."""
_LONGEST = 4
"""Of the shape that a picture is looked at in, in units of its shorter side."""


class OCR(Reward):
    """`1 − d / n` with n the letters of the text asked for and d its Levenshtein distance from what is read, at most n.

    Both in lower case and without spaces, after Unicode's NFKC (the reader writes full-width marks beside Latin
    letters). d is 0 if all that was read, joined in reading order, contains the text. The text is `targets["text"]`, or
    the first span of the prompt in double quotes.

    Where nothing but lone characters is read, or two round ones (a ring is read as O, a bar as I, two discs as 80),
    they count only if they make up the whole text: a picture without text earns nothing.

    Source: Flow-GRPO's OCR reward (Liu et al. 2025, `flow_grpo/ocr.py`), with RapidOCR in place of PaddleOCR's English
    models; NFKC, a least confidence and the last rule are ours.
    """

    name = "ocr"
    accuracy_above = 1.0
    about = "RapidOCR: 1 − edit distance / length between the text read and the text asked for; 0 to 1"
    facts = Facts(
        model="PP-OCR's small detector and recogniser (Chinese and Latin letters), from the wheel of rapidocr",
        preprocessing="found in the picture with its shorter side at settings.side pixels, read at full size; what is "
        "upside down is not read",
        scale="0 to 1; differs within a prompt by about 0.3 while a model learns to write; part of a word earns part",
        applies="prompts with targets.text or with a text in double quotes",
        licence="Apache-2.0 (rapidocr and its PP-OCR models)",
        hacks="text pasted large over the picture, whatever is shown beside it; any legible copy counts, wherever it "
        "stands, and other words beside it cost nothing; 0 and O, 1 and l are mixed up now and then",
    )
    workers = 1
    cached = True

    def __init__(self, *, side: int = 384, min_confidence: float = 0.5, threads: int = 1) -> None:
        """To look for text at `side` pixels and believe readings from `min_confidence` on, in `threads` CPU threads.

        Raises:
            MarbleError: a setting is out of range.
        """
        if side < 64:
            raise MarbleError(f"settings.side must be at least 64, got {side}")
        if not 0 <= min_confidence <= 1:
            raise MarbleError(f"settings.min_confidence must be in [0, 1], got {min_confidence}")
        if threads < 1:
            raise MarbleError(f"settings.threads must be at least 1, got {threads}")
        self.side, self.min_confidence, self.threads = side, min_confidence, threads
        self.revision = _revision()
        self._readers: dict[int, Any] = {}  # by the longer side that text is looked for at

    def applies(self, record: Record) -> bool:
        """Only where a text is asked for."""
        return bool(target_of(record))

    def check(self) -> None:
        """Find out whether RapidOCR and onnxruntime are installed.

        Raises:
            MarbleError: they are not.
        """
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise MarbleError(f'needs {package}: pip install "marble-diffusion[rewards]"')

    def prepare(self) -> None:
        """Load the models and have them read a word.

        Raises:
            MarbleError: they are missing or cannot read it.
        """
        self.check()
        sample = Image.new("RGB", (48, 48), "white")
        ImageDraw.Draw(sample).text((8, 16), "OPEN", fill="black")
        try:
            read = self._read(sample)
        except Exception as error:  # whatever a package says of a damaged or missing model
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise MarbleError(f"RapidOCR cannot be loaded: {reason}") from error
        if _plain("".join(read)) != "open":
            raise MarbleError(f"{self.revision} reads {read} where OPEN is written; install it anew")

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in [0, 1]."""
        return torch.tensor(
            [mark(read, target_of(record)) for read, record in zip(self.read(images), records, strict=True)]
        )

    def read(self, images: Tensor) -> list[list[str]]:
        """The texts found in each of `images` (`[N, 3, H, W]` uint8), in reading order."""
        pictures = (image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy() for image in images)
        return [self._read(Image.fromarray(picture)) for picture in pictures]

    def _read(self, picture: Image.Image) -> list[str]:
        import numpy as np

        short, long = sorted(picture.size)
        at = min(long * self.side // short, _LONGEST * self.side)
        if long < at:
            size = tuple(max(1, round(each * at / long)) for each in picture.size)
            picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        pixels = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])  # blue first
        found = self._reader(at)(pixels)
        if found.txts is None:
            return []
        return _in_order([(box, text) for box, text in zip(found.boxes, found.txts, strict=True)])

    def _reader(self, at: int) -> Any:
        """RapidOCR, looking for text in pictures whose longer side is `at` pixels."""
        if at not in self._readers:
            from rapidocr import RapidOCR

            settings = {
                "Global.log_level": "critical",
                "Global.text_score": self.min_confidence,
                "Global.use_cls": False,
                "Det.limit_type": "max",
                "Det.limit_side_len": at,
                "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
            self._readers.setdefault(at, RapidOCR(params=settings))
        return self._readers[at]


def target_of(record: Record) -> str:
    """The text that a prompt asks for, as it is compared: without spaces, in lower case; empty if there is none."""
    if "text" in record.targets:
        return _plain(str(record.targets["text"]))
    quoted = _QUOTED.search(record.text)
    return _plain(quoted[1]) if quoted else ""


def mark(read: Sequence[str], target: str) -> float:
    """What reading `read`, texts in order, is worth where `target` is asked for: 0 to 1."""
    everything = _plain("".join(read))
    if target in everything:
        return 1.0
    if not any(map(_is_text, read)):
        return 0.0
    return 1 - min(edit_distance(everything, target), len(target)) / len(target)


def _is_text(read: str) -> bool:
    """Whether a reading is more than what rings, discs and strokes are taken for: one letter, or two round ones."""
    letters = [letter for letter in _plain(read) if letter.isalnum()]
    return len(letters) > 2 or (len(letters) == 2 and not set(letters) <= _ROUND)


def edit_distance(one: str, two: str) -> int:
    """Levenshtein's: fewest letters to add, leave out or change."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def _in_order(found: Sequence[tuple[Any, str]]) -> list[str]:
    """Texts (and their four corners, `[4, 2]`) line by line: one that stands less than half a letter lower goes on."""
    lines: list[list[tuple[float, str]]] = []
    start = reach = 0.0
    for box, text in sorted(found, key=lambda each: float(each[0][:, 1].mean())):
        x, y = (float(each) for each in box.mean(axis=0))
        if not lines or y > start + reach:
            start, reach = y, float(box[2:, 1].mean() - box[:2, 1].mean()) / 2
            lines.append([])
        lines[-1].append((x, text))
    return [text for line in lines for _, text in sorted(line)]


def _revision() -> str:
    """`rapidocr 3.10.0: PP-OCRv6_det_small, PP-OCRv6_rec_small`: the models are those in that version's wheel."""
    try:
        models = sorted(PurePath(file).stem for file in files("rapidocr") or () if file.suffix == ".onnx")
        return f"rapidocr {version('rapidocr')}: {', '.join(name for name in models if '_cls_' not in name)}"
    except PackageNotFoundError:
        return "rapidocr"
