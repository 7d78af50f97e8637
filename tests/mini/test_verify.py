import numpy as np
import pytest
import torch

from marble.mini.pairs import blur, noise, wash
from marble.mini.render import render
from marble.mini.verify import ThingFinder, WordReader
from marble.mini.world import MINI, Spec, Thing
from marble.rewards.ocr import edit_distance


def stack(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def reader():
    return WordReader(MINI)


@pytest.fixture(scope="module")
def finder():
    return ThingFinder(MINI)


def test_reads_every_word_in_every_colour(reader, rng):
    specs = MINI.word_specs() + MINI.word_specs(MINI.held_out_words)
    read = reader.read(stack([render(MINI, s, rng) for s in specs]))
    assert sum(r == s.word for r, s in zip(read, specs, strict=True)) >= 0.99 * len(specs)


@pytest.mark.parametrize("spoil", [lambda p, r: blur(p, 1.2), lambda p, r: wash(p, 0.5), lambda p, r: noise(p, r, 15)])
def test_reads_through_mild_damage(reader, rng, spoil):
    specs = MINI.word_specs()[:60]
    read = reader.read(stack([spoil(render(MINI, s, rng), rng) for s in specs]))
    assert sum(r == s.word for r, s in zip(read, specs, strict=True)) >= 0.9 * len(specs)


def test_invents_nothing(reader, rng):
    blank = [np.full((64, 64, 3), 120, np.uint8)] * 3
    grain = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(30)]
    assert set(reader.read(stack(blank + grain))) == {""}


def test_finds_every_object_and_nothing_else(finder, rng):
    specs = [MINI.pools[k][i] for k in ("attribute", "position", "count") for i in rng.integers(72, size=40)]
    found = finder.find(stack([render(MINI, s, rng) for s in specs]))
    exact = [
        sorted((f.colour, f.shape) for f in one) == sorted((t.colour, t.shape) for t in s.things)
        for one, s in zip(found, specs, strict=True)
    ]
    assert np.mean(exact) >= 0.99
    assert np.mean([f.whole for one in found for f in one]) > 0.95


def test_where_it_stands(finder, rng):
    spec = Spec("position", (Thing("red", "circle"), Thing("blue", "square")), relation="above")
    one, two = sorted(finder.find(stack([render(MINI, spec, rng)]))[0], key=lambda f: f.colour != "red")
    assert one.y < two.y


def test_a_blob_of_two_halves_is_not_an_object(finder):
    picture = np.full((64, 64, 3), (110, 110, 118), np.uint8)
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(x - 32, y - 32) < 14
    picture[disc & (x < 32)] = MINI.palette["red"]
    picture[disc & (x >= 32)] = MINI.palette["blue"]
    assert max(f.whole for f in finder.find(stack([picture]))[0]) < 0.2


def test_a_wall_of_colour_is_not_a_square(finder):
    wall = np.full((64, 64, 3), MINI.palette["red"], np.uint8)
    assert [f.whole for f in finder.find(stack([wall]))[0]] == [0.0]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("CAT", "CAT", 0), ("CAT", "", 3), ("CAT", "COT", 1), ("AT", "CAT", 1), ("TAC", "CAT", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance
