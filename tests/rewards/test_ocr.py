import importlib.util
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import make_reward
from marble.rewards.ocr import OCR, edit_distance, mark, target_of

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
SOME = """
OPEN Hello bakery Coffee SALE Marble street GARDEN Music Fresh Bread window PIZZA Library Summer Winter rocket Planet
BOOKS Welcome tomorrow Danger exit Bicycle thunder Market hotel CINEMA Forest Diner lucky Seven Quiet jungle Vintage
Express yellow Zebra kitchen Ocean
"""
WORDS = SOME.split()


@pytest.fixture(scope="module")
def ocr():
    reward = OCR()
    reward.prepare()
    return reward


def drawn(text, font="DejaVuSans", size=(256, 256), place=None, height=32, ink="black", paper="white", rng=None):
    """A picture `[3, H, W]` of a text; with `rng` in colours and at a place of its own."""
    wide, high = size
    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"), height)
    *_, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, font=face)
    if rng is not None:
        light, dark = (tuple(map(int, rng.integers(*span, 3))) for span in ((150, 256), (0, 80)))
        ink, paper = (light, dark) if rng.random() < 0.5 else (dark, light)
        place = (int(rng.integers(4, max(5, wide - right))), int(rng.integers(4, high - bottom)))
    picture = Image.new("RGB", (wide, high), paper)
    ImageDraw.Draw(picture).text(place or (8, 8), text, font=face, fill=ink)
    return to_tensor(picture)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def asked(*texts):
    return [Record(f'a sign that says "{text}"', "s") for text in texts]


def score_of(reward, image, text):
    return reward.score(image[None], asked(text)).item()


# ---- reading --------------------------------------------------------------------------------------------------


def test_forty_words_in_three_fonts_are_read(ocr):
    rng = np.random.default_rng(0)
    pairs = [(word, font) for word in WORDS for font in FONTS]
    images = torch.stack([drawn(word, font, rng=rng) for word, font in pairs])
    assert len(pairs) == 120
    scores = ocr.score(images, asked(*(word for word, _ in pairs)))
    assert scores.shape == (120,)
    assert (scores == 1).float().mean() >= 0.95
    # and each is read as itself, not as any word
    others = ocr.score(images[:12], asked(*(["strawberry"] * 12)))
    assert others.max() < 0.5


@pytest.mark.parametrize("size", [(512, 512), (320, 200), (96, 96), (255, 129), (700, 260)])
def test_other_sizes_and_shapes(ocr, size):
    image = drawn("Marble", size=size, height=max(16, size[1] // 8))
    assert image.shape == (3, size[1], size[0])
    assert score_of(ocr, image, "Marble") == 1


def test_grey_pictures(ocr):
    grey = drawn("Harbour", ink=(90, 90, 90), paper=(200, 200, 200))
    assert score_of(ocr, grey, "harbour") == 1
    assert ocr.score(grey[None, :1], asked("harbour")).item() == 1  # one channel


def test_two_lines_are_one_text_in_reading_order(ocr):
    image = drawn("Fresh Bread\nEvery Day", place=(20, 60))
    assert ocr.read(image[None])[0] in (["Fresh Bread", "Every Day"], ["FreshBread", "EveryDay"])
    assert score_of(ocr, image, "fresh bread every day") == 1
    assert score_of(ocr, image, "every day fresh bread") < 1


def test_texts_side_by_side_are_read_from_left_to_right_though_one_stands_lower(ocr):
    image = drawn("Night", size=(512, 256), place=(300, 108))
    image = torch.minimum(image, drawn("Silent", size=(512, 256), place=(20, 120)))
    assert ocr.read(image[None]) == [["Silent", "Night"]]


def test_a_wrong_letter_costs_its_part(ocr):
    assert score_of(ocr, drawn("MARBLE"), "MARBEE") == pytest.approx(5 / 6)
    assert score_of(ocr, drawn("MARBLE and more"), "marble") == 1  # other words cost nothing


# ---- pictures without text ------------------------------------------------------------------------------------


def textless(size=256):
    """Blank, gradients, noise, shapes, outlines (which look like an O), clouds, stripes, patches, a photograph."""
    rng = np.random.default_rng(3)
    down, across = np.mgrid[:size, :size] / size
    for level in (0, 128, 255):
        yield np.full((size, size, 3), level)
    for _ in range(4):
        slope = across[..., None] * rng.normal(size=3) + down[..., None] * rng.normal(size=3)
        yield 255 * (slope - slope.min()) / np.ptp(slope)
    for spread in (10, 40, 100):
        yield rng.normal(128, spread, (size, size, 3)).clip(0, 255)
    for i in range(16):
        picture = Image.new("RGB", (size, size), tuple(map(int, rng.integers(150, 256, 3))))
        draw, ink = ImageDraw.Draw(picture), tuple(map(int, rng.integers(0, 90, 3)))
        x, y, reach = map(int, rng.integers(size // 8, size // 2, 3))
        draw_one = (draw.ellipse, draw.rectangle)[i % 2]
        if i < 8:
            draw_one((x, y, x + reach * 3 // 4, y + reach), outline=ink, width=4 + i)
        else:
            draw_one((x, y, x + reach, y + reach), fill=ink)
            draw.line((0, y, size, x), fill=ink, width=i - 6)
        yield np.array(picture)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) + 1 / size
    for slope in (1.0, 1.4, 1.8):
        cloud = np.fft.ifft2(
            np.fft.fft2(rng.normal(size=(size, size, 3)), axes=(0, 1)) / frequency[..., None] ** slope, axes=(0, 1)
        )
        yield 255 * (cloud.real - cloud.real.min()) / np.ptp(cloud.real)
    for width in (5, 17):
        yield np.where((across * size // width + down * size // 9)[..., None] % 2 < 1, [200, 40, 40], [240, 230, 200])
    for side in (8, 32):
        yield np.array(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((size, size)))
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    yield np.array(Image.open(photograph).convert("RGB").crop((60, 0, 460, 400)).resize((size, size)))


def test_pictures_without_text_earn_nothing(ocr):
    images = torch.stack([torch.from_numpy(each.astype(np.uint8)).permute(2, 0, 1) for each in textless()])
    assert len(images) > 30
    read = ocr.read(images)
    assert any(read)  # rings are read as O: it is the rule below that makes them worth nothing
    for text in ("OPEN", "Ocean 100", "Willow"):
        assert not any(
            mark(each, target_of(record)) for each, record in zip(read, asked(*[text] * len(read)), strict=True)
        )


def test_lone_characters_count_only_if_they_are_the_whole_text():
    assert mark(["O"], "open") == 0
    assert mark(["O", "1"], "ocean100") == 0
    assert mark(["__"], "a_b") == 0
    assert mark(["80"], "ocean100") == 0
    assert mark(["OQ", "1"], "open") == 0
    assert mark(["OK"], "oak") == pytest.approx(2 / 3)
    assert mark(["80"], "80") == 1
    assert mark(["7"], "7") == 1
    assert mark(["N", "O"], "no") == 1
    assert mark(["OP", "E"], "open") == pytest.approx(3 / 4)  # beside more than one they count as ever


# ---- marks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),  # k → s, e → i, + g
        ("flaw", "lawn", 2),  # − f, + n
        ("open", "0pen", 1),
        ("abcdef", "badcfe", 4),  # + b, a, b → d, c, d → f, e, − f
    ],
)
def test_edit_distance(one, two, distance):
    assert edit_distance(one, two) == edit_distance(two, one) == distance


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        (["OPEN"], "open", 1.0),
        (["We are", "OPEN late"], "open", 1.0),  # contained
        (["Open la", "te"], "openlate", 1.0),  # joined
        (["OPEM"], "open", 0.75),  # one of four
        (["OPE"], "open", 0.75),
        (["CLOSED"], "open", 0.0),  # d = 4: − c, − l, o, s → p, e, d → n
        (["a wholly other text"], "open", 0.0),  # d = 14, capped at 4
        (["hello"], "hallo", 0.8),
        ([], "open", 0.0),
        (["ＯＰＥＮ！"], "open!", 1.0),  # full-width marks, as the reader writes beside Chinese
    ],
)
def test_marks_by_hand(read, target, expected):
    assert mark(read, target) == pytest.approx(expected)


# ---- what it applies to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets", "target"),
    [
        ('a sign that says "Open Late"', {}, "openlate"),
        ("a sign that says “Open Late”", {}, "openlate"),
        ('"First" and "second"', {}, "first"),
        ('a sign that says "Open"', {"text": "CLOSED Today"}, "closedtoday"),
        ("a sign without quotes", {"text": "A B"}, "ab"),
        ("a sign without quotes", {}, ""),
        ("somebody's 'single' quotes", {}, ""),
        ('empty "" and "full"', {}, ""),
        ('only "   " spaces', {}, ""),
        ('a sign that says "Open"', {"text": "  "}, ""),
        ('one " alone', {}, ""),
    ],
)
def test_the_text_asked_for(text, targets, target):
    record = Record(text, "s", targets)
    assert target_of(record) == target
    assert OCR().applies(record) == bool(target)


# ---- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 32}, "settings.side must be at least 64, got 32"),
        ({"min_confidence": 1.5}, r"settings.min_confidence must be in \[0, 1\], got 1.5"),
        ({"threads": 0}, "settings.threads must be at least 1, got 0"),
        ({"sides": 300}, 'Did you mean "side"'),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(MarbleError, match=message):
        make_reward(RewardUse(reward="ocr", settings=settings))


def test_it_judges_beside_the_sampling_and_says_what_reads():
    reward = make_reward(RewardUse(reward="ocr", settings={"side": 320}))
    assert reward.workers == 1
    assert reward.revision.startswith("rapidocr 3.")
    assert "det" in reward.revision
    assert "rec" in reward.revision
    assert "_cls_" not in reward.revision


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MarbleError, match=rf'needs {package}: pip install "marble-diffusion\[rewards\]"'):
        OCR().check()


def test_nothing_is_said_on_the_way(ocr, capfd, caplog):
    ocr.read(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_scores_do_not_depend_on_the_batch(ocr):
    images = torch.stack([drawn(word, height=20 + 4 * i) for i, word in enumerate(WORDS[:4])])
    together = ocr.score(images, asked(*WORDS[3::-1]))
    alone = [score_of(ocr, image, text) for image, text in zip(images, WORDS[3::-1], strict=True)]
    assert together.tolist() == alone
