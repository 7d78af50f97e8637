import io
import math

import pytest
import torch
from PIL import Image

from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import load_rewards, make_reward
from marble.rewards.closed_form import Colourfulness, JPEGSize, Sharpness


def score(reward, *images):
    return reward.score(torch.stack(images), [Record("anything", "s")] * len(images)).tolist()


def grey(rows):
    return torch.tensor(rows, dtype=torch.uint8).expand(3, -1, -1)


def noise(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_jpeg(image, quality):
    picture, file = Image.new("RGB", (image.shape[2], image.shape[1])), io.BytesIO()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            picture.putpixel((x, y), tuple(image[:, y, x].tolist()))
    picture.save(file, format="JPEG", quality=quality)
    return len(file.getvalue())


def test_jpeg_size_is_that_of_the_file_at_quality_95():
    images = [noise(9, 21), noise(9, 21, 1), noise(9, 21) // 64 * 64]
    sizes = score(JPEGSize(), *images)
    assert sizes == [as_jpeg(image, 95) / 1000 for image in images]
    assert sizes[0] != as_jpeg(images[0], 94) / 1000
    assert score(JPEGSize(small=True), *images) == [-size for size in sizes]


def test_jpeg_size_of_noise_is_more_than_of_one_colour():
    assert score(JPEGSize(), noise(64, 64))[0] > 5 * score(JPEGSize(), torch.full((3, 64, 64), 90).byte())[0]


def test_sharpness_by_hand():
    # one white pixel in the middle of 3 × 3: −4 there; an edge pixel sees it twice, itself and mirrored; corners not
    # at all: mean 4 / 9, mean square (16 + 4 · 4) / 9
    assert score(Sharpness(), grey([[0, 0, 0], [0, 255, 0], [0, 0, 0]])) == pytest.approx([32 / 9 - 16 / 81], rel=1e-12)
    # a white corner: −4 there, 1 at its two neighbours: mean −2 / 9, mean square 18 / 9
    assert score(Sharpness(), grey([[255, 0, 0], [0, 0, 0], [0, 0, 0]])) == pytest.approx([2 - 4 / 81], rel=1e-12)
    # a white edge pixel: −4 there, 2 in the corners beside it, 1 in the middle: mean 1 / 9, mean square 25 / 9
    assert score(Sharpness(), grey([[0, 255, 0], [0, 0, 0], [0, 0, 0]])) == pytest.approx([25 / 9 - 1 / 81], rel=1e-12)
    # single pixels of a chequerboard: ±4 everywhere
    board = (torch.arange(6)[:, None] + torch.arange(8)) % 2 * 255
    assert score(Sharpness(), grey(board.tolist())) == pytest.approx([16.0], rel=1e-12)
    assert score(Sharpness(), torch.full((3, 4, 4), 200).byte()) == [0.0]


def test_sharpness_against_a_plain_loop():
    image = noise(5, 7)
    light = [
        [(0.299 * r + 0.587 * g + 0.114 * b) / 255 for r, g, b in zip(*rows, strict=True)]
        for rows in zip(*image.tolist(), strict=True)
    ]
    mirror = {-1: 1, 5: 3}, {-1: 1, 7: 5}
    values = [
        sum(
            light[mirror[0].get(y + dy, y + dy)][mirror[1].get(x + dx, x + dx)]
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))
        )
        - 4 * light[y][x]
        for y in range(5)
        for x in range(7)
    ]
    mean = sum(values) / 35
    expected = sum((value - mean) ** 2 for value in values) / 35
    assert score(Sharpness(), image) == pytest.approx([expected], rel=1e-12)


def test_colourfulness_by_hand():
    red, cyan, blue = ([255, 0, 0], [0, 255, 255], [0, 0, 255])

    def halves(one, other):
        return torch.tensor([one, other], dtype=torch.uint8).T[:, None].repeat(1, 4, 3)

    # all red: rg 255, yb 127.5, no spread
    assert score(Colourfulness(), halves(red, red)) == pytest.approx([0.3 * 127.5 * math.sqrt(5)], rel=1e-12)
    # red and cyan: rg ±255, yb ±127.5, no mean
    assert score(Colourfulness(), halves(red, cyan)) == pytest.approx([127.5 * math.sqrt(5)], rel=1e-12)
    # red and blue: rg 255 and 0: mean and deviation 127.5; yb 127.5 and −255: mean −63.75, deviation 191.25
    expected = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert score(Colourfulness(), halves(red, blue)) == pytest.approx([expected], rel=1e-12)
    assert score(Colourfulness(), noise(4, 6)[:1].expand(3, -1, -1)) == [0.0]


def test_a_score_does_not_depend_on_the_others_in_its_batch():
    images = [noise(17, 13, seed) for seed in range(3)]
    for reward in (JPEGSize(), Sharpness(), Colourfulness()):
        assert score(reward, *images) == [score(reward, image)[0] for image in images]


def test_as_registered():
    names = ["jpeg-size", "sharpness", "colourfulness"]
    rewards = load_rewards(names)
    assert [reward.name for reward in rewards] == names
    assert all(reward.revision and reward.facts and not reward.cached for reward in rewards)
    small = make_reward(RewardUse(reward="jpeg-size", settings={"small": True}))
    assert score(small, noise(8, 8))[0] < 0
