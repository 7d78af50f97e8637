"""Pictures and prompts on their way to a reward on a server, and scores on their way back.

Pictures travel as 8-bit PNGs, which lose nothing, and scores as JSON numbers, which hold every float64 exactly: what a
server answers is what it computed, bit for bit.

Nothing that is read here can run code. JSON takes up to some thirty times its length once it is read, so it may have
`MOST_JSON` bytes; a request's larger pictures are cut out before and not counted, as they take their own length. What
they take unpacked is known from their heads and bounded before anything is.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record

MOST_PIXELS = 2**26
"""Of one picture: 8192 × 8192."""
MOST_JSON = 4 * 2**20
"""Bytes of a message, the larger pictures of a request to score apart."""
MOST_RECORDS = 10_000
"""Prompts in one message."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"
_LARGE = re.compile(rb'(?<!\\)"([A-Za-z0-9+/]{4096,}={0,2})"')
_PLACE = re.compile(r"\0([0-9]{1,6})")


class WireError(MarbleError):
    """What came over the wire is not what it should be; `status` is what a server says to it."""

    def __init__(self, message: str, status: int = 422) -> None:
        """400 for what cannot be read at all, 422 for what does not fit."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A request to score, its pictures not decoded yet."""

    reward: str
    records: list[Record]  # [N]
    images: list[list[str | bytes]]  # [N][F] base64; F is 1 for a picture
    videos: bool


def to_png(image: Tensor) -> bytes:
    """A picture `[3, H, W]` uint8 as a PNG, packed quickly rather than small."""
    packed = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(packed, "PNG", compress_level=1)
    return packed.getvalue()


def from_png(data: bytes, most_pixels: int = MOST_PIXELS) -> Tensor:
    """`[3, H, W]` uint8.

    Raises:
        WireError: not a PNG, not RGB with 8 bits a channel, broken, or of more than `most_pixels`.
    """
    if len(data) < 26 or not data.startswith(SIGNATURE) or data[12:16] != b"IHDR":
        raise WireError("an image is no PNG", 400)
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    if (depth, kind) != (8, 2):
        raise WireError("an image is not RGB with 8 bits a channel")
    if not 0 < width * height <= most_pixels:
        raise WireError(f"an image is {width} × {height}; at most {most_pixels} pixels of each are taken", 413)
    if not data.endswith(END):  # Pillow may have been told elsewhere to fill in what is cut off
        raise WireError("an image is a broken PNG", 400)
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as picture:
            if picture.mode != "RGB" or picture.size != (width, height):
                raise WireError("an image is not RGB with 8 bits a channel")
            pixels = np.array(picture)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # all of these are Pillow's for damage
        raise WireError("an image is a broken PNG", 400) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def pack_records(records: Sequence[Record]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [{"text": record.text, "source": record.source, "targets": record.targets} for record in records]


def pack(message: dict[str, Any]) -> bytes:
    """JSON.

    Raises:
        MarbleError: a prompt's targets are not JSON.
    """
    try:
        return json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise MarbleError(f"targets: a prompt's are not plain JSON, so no server can be sent them: {error}") from error


def pack_request(reward: str, images: Tensor, records: Sequence[Record]) -> bytes:
    """The body of a request to score `[N, 3, H, W]` or `[N, F, 3, H, W]` uint8 images."""
    encoded: list[Any]
    if images.ndim == 5:
        encoded = [[_encode(frame) for frame in video] for video in images]
    else:
        encoded = [_encode(image) for image in images]
    return pack({"reward": reward, "records": pack_records(records), "images": encoded})


def _encode(image: Tensor) -> str:
    return base64.b64encode(to_png(image)).decode("ascii")


def unpack(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WireError: it is none, or of more than `MOST_JSON` bytes.
    """
    if len(body) > MOST_JSON:
        raise WireError(f"the body: at most {MOST_JSON} bytes are taken beside large pictures, got {len(body)}", 413)
    try:
        message = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError("the body is no JSON", 400) from error
    if not isinstance(message, dict):
        raise WireError("the body is no JSON object", 400)
    return message


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def unpack_name(message: dict[str, Any]) -> str:
    """The reward asked for.

    Raises:
        WireError: it is not named.
    """
    if not isinstance(message.get("reward"), str):
        raise WireError("reward: a name is needed")
    return message["reward"]


def unpack_records(message: dict[str, Any]) -> list[Record]:
    """The prompts `[N]` of a request.

    Raises:
        WireError: one of them is none.
    """
    rows = message.get("records")
    if not isinstance(rows, list):
        raise WireError("records: a list is needed")
    if len(rows) > MOST_RECORDS:
        raise WireError(f"records: at most {MOST_RECORDS}, got {len(rows)}", 413)
    for at, row in enumerate(rows):
        fits = isinstance(row, dict) and isinstance(row.get("text"), str) and isinstance(row.get("source", ""), str)
        if not fits or not isinstance(row.get("targets", {}), dict):
            raise WireError(f"records.{at}: needs a text, a source and targets by name")
    return [Record(row["text"], row.get("source", ""), row.get("targets", {})) for row in rows]


def unpack_request(body: bytes | bytearray) -> Asked:
    """A request to score, its pictures still packed.

    Raises:
        WireError: it does not have the form of one.
    """
    cut: list[bytes] = []

    def place(found: re.Match[bytes]) -> bytes:
        cut.append(found[1])
        return b'"\\u0000%d"' % (len(cut) - 1)

    message = unpack(_LARGE.sub(place, body))
    name, records, images = unpack_name(message), unpack_records(message), message.get("images")
    if not isinstance(images, list):
        raise WireError("images: a list is needed")
    if len(images) != len(records):
        raise WireError(f"images: as many as records are needed, {len(records)}, got {len(images)}")
    if not images:
        raise WireError("images: at least one is needed")
    videos = isinstance(images[0], list)
    rows = images if videos else [[image] for image in images]
    if not all(isinstance(row, list) and row and all(isinstance(frame, str) for frame in row) for row in rows):
        raise WireError("images: each is a base64 PNG, or each a list of them, the frames of a video")
    if len({len(row) for row in rows}) > 1:
        raise WireError("images: the videos of a request have equally many frames")
    filled = [[_filled(frame, cut) for frame in row] for row in rows]
    if any(cut):
        raise WireError("the body: has a word of over 4000 letters that is no image")
    return Asked(name, records, filled, videos)


def _filled(frame: str, cut: list[bytes]) -> str | bytes:
    """The picture that was cut out there."""
    if not (place := _PLACE.fullmatch(frame)):
        return frame
    at = int(place[1])
    if at >= len(cut) or not cut[at]:
        raise WireError("images: one is not base64", 400)
    picture, cut[at] = cut[at], b""
    return picture


def decode_images(asked: Asked, most_bytes: int) -> Tensor:
    """`[N, 3, H, W]` or `[N, F, 3, H, W]` uint8, of at most `most_bytes` in all.

    Raises:
        WireError: an image cannot be read, they differ in size, or there are more than that.
    """
    made: Tensor | None = None
    count, frames = len(asked.images), len(asked.images[0])
    most_pixels = min(MOST_PIXELS, most_bytes // (3 * count * frames))
    for at, frame in enumerate(frame for row in asked.images for frame in row):
        try:
            image = from_png(base64.b64decode(frame, validate=True), most_pixels)
        except ValueError as error:
            raise WireError("images: one is not base64", 400) from error
        if made is None:
            made = torch.empty((count * frames, *image.shape), dtype=torch.uint8)
        if image.shape != made.shape[1:]:
            raise WireError("images: those of a request have one size")
        made[at] = image
    assert made is not None
    return made.unflatten(0, (count, frames)) if asked.videos else made


def pack_scores(scores: Tensor) -> list[float | None]:
    """`[N]` float64 as JSON numbers, null where there is none."""
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def unpack_scores(scores: Any, count: int) -> Tensor:
    """`[count]` float64, NaN for null.

    Raises:
        WireError: not as many numbers or nulls.
    """
    if not isinstance(scores, list) or len(scores) != count:
        raise WireError(f"scores: {count} are needed, got {len(scores) if isinstance(scores, list) else 'none'}")
    if not all(score is None or (isinstance(score, int | float) and not isinstance(score, bool)) for score in scores):
        raise WireError("scores: each is a number or null")
    return torch.tensor([math.nan if score is None else float(score) for score in scores], dtype=torch.float64)
