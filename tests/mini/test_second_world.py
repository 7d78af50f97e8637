"""The second world has nothing to draw in common with the first, and the same readers read it."""

import numpy as np
import pytest
import torch

from marble.mini.build import CONTEXT_TOKENS, build_tokenizer
from marble.mini.prompts import second_objects, second_places, second_words, to_record
from marble.mini.render import render
from marble.mini.rewards import Composition, TextRendering
from marble.mini.world import MINI, MINI_B


def drawn(specs, rng):
    pictures = np.stack([render(MINI_B, spec, rng) for spec in specs])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(
    "part", ["shapes", "palette", "letters", "words", "held_out_words", "places", "times", "extras"]
)
def test_nothing_in_common(part):
    assert not set(getattr(MINI, part)) & set(getattr(MINI_B, part))


def test_its_own_captions_are_not_the_first_ones():
    ours = {MINI_B.caption(spec) for pool in MINI_B.pools.values() for spec in pool}
    theirs = {MINI.caption(spec) for pool in MINI.pools.values() for spec in pool}
    assert not ours & theirs
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("kind", ["attribute", "count", "position"])
def test_clean_objects_are_found(kind):
    rng = np.random.default_rng(0)
    specs = [MINI_B.pools[kind][i] for i in rng.integers(len(MINI_B.pools[kind]), size=120)]
    marks = Composition(world="mini-b").score(drawn(specs, rng), [to_record(s, "test", MINI_B) for s in specs])
    assert marks.mean() > 0.99


def test_clean_words_are_read():
    rng = np.random.default_rng(0)
    pool = MINI_B.word_specs() + MINI_B.word_specs(MINI_B.held_out_words)
    specs = [pool[i] for i in rng.integers(len(pool), size=120)]
    marks = TextRendering(world="mini-b").score(drawn(specs, rng), [to_record(s, "test", MINI_B) for s in specs])
    assert marks.mean() > 0.99


def test_every_caption_fits_and_words_are_spelled():
    tokenizer = build_tokenizer(MINI_B, "!")
    for pool in MINI_B.pools.values():
        assert max(len(tokenizer(MINI_B.caption(spec)).input_ids) for spec in pool[::7]) <= CONTEXT_TOKENS
    for word in MINI_B.words + MINI_B.held_out_words:
        spelled = tokenizer.tokenize(MINI_B.caption(MINI_B.word_specs((word,))[0]))
        at = spelled.index('"</w>') + 1
        assert [token.removesuffix("</w>") for token in spelled[at : at + 3]] == list(word.lower())


@pytest.mark.parametrize("source", [second_places, second_words, second_objects])
def test_train_and_held_out_are_apart(source):
    train, held_out = ({record.text for record in source(split)} for split in ("train", "held-out"))
    assert train
    assert held_out
    assert not train & held_out


@pytest.mark.parametrize(("kind", "total"), [("place", 1400322), ("attribute", 1327433), ("word", 1497389)])
def test_the_first_world_is_drawn_as_before(kind, total):
    rng = np.random.default_rng(["place", "attribute", "word"].index(kind))
    assert int(render(MINI, MINI.pools[kind][5], rng).astype(np.int64).sum()) == total
