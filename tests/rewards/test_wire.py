import base64
import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from marble import MarbleError
from marble.prompts import Record
from marble.rewards import wire


def png_of(picture, **options):
    packed = BytesIO()
    picture.save(packed, options.pop("format", "PNG"), **options)
    return packed.getvalue()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_picture_comes_out_as_it_went_in(height, width, seed):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(wire.from_png(wire.to_png(image)), image)


def test_a_request_comes_out_as_it_went_in():
    records = [Record('"A" \u2028 ü', "s", {"objects": [{"name": "cat", "count": 2}]}), Record("b", "s")]
    videos = torch.arange(2 * 3 * 3 * 2 * 5).reshape(2, 3, 3, 2, 5).to(torch.uint8)
    for images in (videos[:, 0], videos):
        asked = wire.unpack_request(wire.pack_request("name", images, records))
        assert (asked.reward, asked.records) == ("name", records)
        assert torch.equal(wire.decode_images(asked, 10**6), images)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
@settings(max_examples=50, deadline=None)
def test_scores_keep_every_bit(values):
    scores = torch.tensor([*values, torch.nan], dtype=torch.float64)
    read = wire.unpack_scores(wire.unpack(wire.pack({"scores": wire.pack_scores(scores)}))["scores"], len(scores))
    assert read.numpy().tobytes() == scores.numpy().tobytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GOOD = wire.to_png(torch.zeros(3, 2, 2, dtype=torch.uint8))
HUGE = wire.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**14, 2**14, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
SIXTEEN = wire.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "no PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 30, 400, "no PNG"),
        (png_of(Image.new("RGB", (4, 4)), format="JPEG"), 400, "no PNG"),
        (png_of(Image.new("RGBA", (4, 4))), 422, "not RGB"),
        (png_of(Image.new("L", (4, 4))), 422, "not RGB"),
        (png_of(Image.new("P", (4, 4))), 422, "not RGB"),
        (SIXTEEN, 422, "not RGB"),
        (HUGE, 413, "16384 × 16384"),
        (GOOD[:-20], 400, "broken"),
        (GOOD[:40] + b"\0\0" + GOOD[42:], 400, "broken"),
    ],
)
def test_what_is_no_picture(data, status, message):
    with pytest.raises(wire.WireError, match=message) as caught:
        wire.from_png(data)
    assert caught.value.status == status


def test_pictures_that_unpack_to_too_much_or_differ():
    flat = base64.b64encode(png_of(Image.fromarray(np.zeros((100, 100, 3), np.uint8)))).decode()
    small = base64.b64encode(GOOD).decode()

    def asked(images):
        records = [{"text": "a", "source": "s", "targets": {}}] * len(images)
        return wire.unpack_request(wire.pack({"reward": "r", "records": records, "images": images}))

    assert wire.decode_images(asked([flat] * 3), 90_000).shape == (3, 3, 100, 100)
    for images, message in (
        ([flat] * 3, "100 × 100; at most 9999 pixels"),
        ([small, flat], "one size"),
        (["?"], "base64"),
    ):
        with pytest.raises(wire.WireError, match=message):
            wire.decode_images(asked(images), 89_999)
    for images in ([[flat], [flat, flat]], [flat, [flat]], [[], []], [3]):
        with pytest.raises(wire.WireError, match="images: "):
            asked(images)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff\xfe\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_message(body):
    with pytest.raises(wire.WireError, match="the body is no JSON"):
        wire.unpack(body)


def test_targets_that_are_not_json():
    for bad in ({1, 2}, float("nan")):
        with pytest.raises(MarbleError, match="targets: a prompt's are not plain JSON"):
            wire.pack_request("r", torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [Record("a", "s", {"x": bad})])


@pytest.mark.parametrize("scores", [None, [1.0], [1.0, "2"], [1.0, True], [1.0, 2.0, 3.0]])
def test_what_are_no_scores(scores):
    with pytest.raises(wire.WireError, match="scores: "):
        wire.unpack_scores(scores, 2)


def test_large_pictures_among_small_ones():
    noise = torch.randint(0, 256, (3, 3, 3, 50, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise[1] = 7  # packs small, and stays in the JSON
    records = [Record("a", "s", {"word": "A" * 4095})] * 3
    for images in (noise, noise[:, 0]):
        asked = wire.unpack_request(wire.pack_request("name", images, records))
        assert asked.records == records
        assert [type(row[0]) for row in asked.images] == [bytes, str, bytes]
        assert torch.equal(wire.decode_images(asked, 10**6), images)


LARGE = "A" * 5000


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (LARGE, ["A"], "no image"),
        (f'"{LARGE}"', ["A"], None),  # quotes in a text begin no picture
        (f'\\"{LARGE}', ["A"], None),
        ("a", ["\x000"], "one is not base64"),
        ("a", ["\x001"], "one is not base64"),
        ("a", [LARGE, "\x000"], "one is not base64"),
        (LARGE, ["\x000"], None),  # odd, and harmless
    ],
)
def test_pictures_that_are_cut_out_are_put_back_where_they_were(text, images, message):
    body = wire.pack({"reward": "r", "records": [{"text": text}] * len(images), "images": images})
    if message is None:
        assert len(wire.unpack_request(body).images) == 1
    else:
        with pytest.raises(wire.WireError, match=message):
            wire.unpack_request(body)


@pytest.mark.parametrize("read", [wire.unpack, wire.unpack_request])
def test_json_takes_no_more_memory_than_its_bound_lets_it(read):
    bomb = b'{"records":[' + b"{}," * 2_700_000 + b'{}],"images":["' + b"A" * 5000 + b'"]}'
    tracemalloc.start()
    with pytest.raises(wire.WireError, match="at most 4194304 bytes are taken beside large pictures") as caught:
        read(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb)
    tracemalloc.stop()
    assert caught.value.status == 413


def test_too_many_prompts():
    rows = [{"text": "a"}] * 10_001
    with pytest.raises(wire.WireError, match="records: at most 10000, got 10001") as caught:
        wire.unpack_records({"records": rows})
    assert caught.value.status == 413
    assert len(wire.unpack_records({"records": rows[1:]})) == 10_000
