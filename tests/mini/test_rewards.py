"""Every reward puts perfect pictures at the top, junk at the bottom, and worse pictures in order in between."""

import time

import numpy as np
import pytest
import torch

from marble.mini.judges import junk_picture, spoil
from marble.mini.pairs import blur, noise
from marble.mini.prompts import to_record
from marble.mini.render import render
from marble.mini.rewards import (
    GENERAL,
    Aesthetic,
    Alignment,
    Composition,
    Diversity,
    Preference,
    SecondAlignment,
    TextRendering,
)
from marble.mini.world import MINI, OPPOSITE, Spec, Thing

GENERAL_REWARDS = [Aesthetic, Alignment, Preference, SecondAlignment]
COUNT = 100


def stack(pictures):
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def specs():
    rng = np.random.default_rng(3)
    pools = list(MINI.pools.values())
    return [pools[i % 5][rng.integers(len(pools[i % 5]))] for i in range(COUNT)]


@pytest.fixture(scope="module")
def records(specs):
    return [to_record(spec, "test") for spec in specs]


@pytest.fixture(scope="module")
def perfect(specs):
    rng = np.random.default_rng(4)
    return [render(MINI, spec, rng) for spec in specs]


def mean(reward, pictures, records):
    return reward.score(stack(pictures), records).double().mean().item()


@pytest.mark.parametrize("kind", GENERAL_REWARDS, ids=lambda k: k.name)
def test_general_rewards_fall_in_order(kind, perfect, records):
    rng, reward = np.random.default_rng(5), kind()
    clean = mean(reward, perfect, records)
    mild = mean(reward, [spoil(p, rng, heavy=False) for p in perfect], records)
    heavy = mean(reward, [spoil(p, rng, heavy=True) for p in perfect], records)
    junk = mean(reward, [junk_picture(MINI, rng) for _ in perfect], records)
    assert clean > 0.85 * GENERAL
    assert clean > mild > heavy > junk
    assert junk < 0.15 * clean


@pytest.mark.parametrize("kind", GENERAL_REWARDS, ids=lambda k: k.name)
def test_blur_and_noise_lower_general_rewards_step_by_step(kind, perfect, records):
    reward = kind()
    for worse in (lambda p, s: blur(p, 1.5 * s), lambda p, s: noise(p, np.random.default_rng(0), 30 * s)):
        levels = [mean(reward, [worse(p, s) for p in perfect], records) for s in (0.0, 1.0, 2.5)]
        assert levels[0] > levels[1] >= levels[2]


@pytest.mark.parametrize("kind", [Alignment, SecondAlignment], ids=lambda k: k.name)
def test_alignment_judges_know_a_near_miss_and_another_caption(kind, specs, perfect, records):
    rng, reward = np.random.default_rng(6), kind()
    right = reward.score(stack(perfect), records)
    miss = reward.score(stack([render(MINI, MINI.confuse(s, rng), rng) for s in specs]), records)
    other = reward.score(stack(perfect), records[1:] + records[:1])
    assert (right > miss).double().mean() > 0.85
    assert (right > other).double().mean() > 0.95
    assert right.mean() > miss.mean() > other.mean()


def test_the_two_alignment_judges_are_different():
    one, two = Alignment()._judge[0], SecondAlignment()._judge[0]
    shapes = [tuple(p.shape for p in judge.parameters()) for judge in (one, two)]
    assert shapes[0] != shapes[1]


HACKS = {
    "noise": lambda rng: rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
    "flat saturation": lambda rng: np.full((64, 64, 3), MINI.palette[list(MINI.palette)[rng.integers(5)]], np.uint8),
    "half and half": lambda rng: _halves(rng),
}


def _halves(rng):
    picture = np.full((64, 64, 3), (110, 110, 118), np.uint8)
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(x - 32, y - 32) < rng.uniform(10, 20)
    one, two = rng.choice(len(MINI.palette), 2, replace=False)
    colours = list(MINI.palette.values())
    picture[disc & (x < 32)] = colours[one]
    picture[disc & (x >= 32)] = colours[two]
    return picture


@pytest.mark.parametrize("hack", HACKS)
@pytest.mark.parametrize(
    "kind", [Aesthetic, Alignment, Preference, SecondAlignment, TextRendering, Composition], ids=lambda k: k.name
)
def test_known_hacks_score_at_the_bottom(kind, hack, perfect, records):
    rng, reward = np.random.default_rng(7), kind()
    judged = [i for i, r in enumerate(records) if reward.applies(r)]
    chosen = [records[i] for i in judged]
    top = mean(reward, [perfect[i] for i in judged], chosen)
    assert mean(reward, [HACKS[hack](rng) for _ in judged], chosen) < 0.2 * top


def test_specialists_apply_to_their_own_prompts_only(specs, records):
    text, composition = TextRendering(), Composition()
    for spec, record in zip(specs, records, strict=True):
        assert text.applies(record) == (spec.kind == "word")
        assert composition.applies(record) == (spec.kind in ("attribute", "position", "count"))


def score_one(reward, drawn, asked, seed=0):
    picture = stack([render(MINI, drawn, np.random.default_rng(seed))])
    return reward.score(picture, [to_record(asked, "test")]).item()


def test_text_counts_letters():
    asked, reward = Spec("word", word="CAT", colour="white"), TextRendering()
    marks = [score_one(reward, Spec("word", word=w, colour="white"), asked) for w in ("CAT", "COT", "HOT", "HOP")]
    assert marks == pytest.approx([1, 2 / 3, 1 / 3, 0])


RED, BLUE = Thing("red", "circle"), Thing("blue", "square")


@pytest.mark.parametrize(
    ("asked", "drawn", "low", "high"),
    [
        (Spec("attribute", (RED,)), Spec("attribute", (RED,)), 0.95, 1.0),
        (Spec("attribute", (RED,)), Spec("attribute", (Thing("red", "square"),)), 0.46, 0.51),
        (Spec("attribute", (RED,)), Spec("attribute", (Thing("blue", "circle"),)), 0.32, 0.36),
        (Spec("attribute", (RED,)), Spec("attribute", (BLUE,)), 0.0, 0.0),
        (Spec("attribute", (RED,)), Spec("count", (RED,) * 2), 0.45, 0.5),
        (Spec("count", (RED,) * 3), Spec("count", (RED,) * 3), 0.95, 1.0),
        (Spec("count", (RED,) * 3), Spec("count", (RED,) * 2), 0.6, 0.67),
        (Spec("count", (RED,) * 3), Spec("count", (RED,) * 4), 0.7, 0.75),
    ],
)
def test_composition_by_hand(asked, drawn, low, high):
    assert low <= score_one(Composition(), drawn, asked) <= high


@pytest.mark.parametrize("relation", OPPOSITE)
def test_composition_knows_sides(relation):
    reward = Composition()
    asked = Spec("position", (RED, BLUE), relation=relation)
    wrong = Spec("position", (RED, BLUE), relation=OPPOSITE[relation])
    for seed in range(5):
        assert score_one(reward, asked, asked, seed) > 0.95
        assert score_one(reward, wrong, asked, seed) == pytest.approx(0.5, abs=0.03)


def test_diversity_of_a_group(rng):
    reward, spec = Diversity(), Spec("attribute", (RED,))
    record = [to_record(spec, "test")] * 6
    varied = stack([render(MINI, spec, rng) for _ in range(6)])
    timid = stack([render(MINI, spec, rng, variety=0.2) for _ in range(6)])
    same = varied[:1].expand(6, -1, -1, -1)
    static = stack([HACKS["noise"](rng) for _ in range(6)])
    tints = stack([HACKS["flat saturation"](rng) for _ in range(6)])
    marks = [reward.score(images, record).mean().item() for images in (varied, timid, static, tints, same)]
    assert marks[0] > marks[1] > 2 * marks[2]
    assert max(marks[3:]) < 1e-6
    # duplicates lower the mark of those duplicated, not of the odd one out
    odd = torch.cat([varied[:1].expand(5, -1, -1, -1), varied[1:2]])
    scores = reward.score(odd, record)
    assert scores[5] > scores[:5].max()
    assert reward.score(varied[:1], record[:1]).tolist() == [0.0]


def test_native_scales_are_those_of_the_real_ones(specs, records):
    """Within a prompt general rewards spread by about a hundredth, specialists by tenths."""
    rng = np.random.default_rng(8)
    spread = {}
    for kind in (Aesthetic, Alignment, Preference, TextRendering, Composition):
        reward, stds = kind(), []
        for spec, record in zip(specs, records, strict=True):
            if reward.applies(record):
                drawn = [spec, spec, MINI.confuse(spec, rng), MINI.confuse(MINI.confuse(spec, rng), rng)]
                pictures = [spoil(render(MINI, s, rng), rng, heavy=i % 2 == 1) for i, s in enumerate(drawn)]
                stds.append(reward.score(stack(pictures), [record] * 4).double().std(correction=0).item())
        spread[kind.name] = np.mean(stds)
    for name in ("aesthetic", "alignment", "preference"):
        assert 0.003 < spread[name] < 0.03, spread
    for name in ("text", "composition"):
        assert 0.1 < spread[name] < 0.5, spread


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [Aesthetic, Alignment, Preference, SecondAlignment, TextRendering, Composition, Diversity],
    ids=lambda k: k.name,
)
def test_under_two_milliseconds_an_image(kind, perfect, records):
    reward = kind()
    judged = [i for i, r in enumerate(records) if reward.applies(r)]
    images, chosen = stack([perfect[i] for i in judged]), [records[i] for i in judged]
    reward.score(images, chosen)
    best = np.inf
    for _ in range(5):
        start = time.process_time()
        reward.score(images, chosen)
        best = min(best, time.process_time() - start)
    assert best / len(images) < 2e-3
