import re
from dataclasses import replace

import numpy as np
import pytest

from marble.mini.build import build_tokenizer
from marble.mini.font import GLYPHS
from marble.mini.render import SHAPES, render
from marble.mini.world import MINI, Grammar, Spec, Thing


def test_captions():
    red = Thing("red", "circle")
    specs = {
        "a red circle": Spec("attribute", (red,)),
        "a small red circle": Spec("attribute", (Thing("red", "circle", "small"),)),
        "three red circles": Spec("count", (red,) * 3),
        'the word "CAT" in blue': Spec("word", word="CAT", colour="blue"),
        "a beach at noon with birds": Spec("place", place="beach", time="noon", extra="birds"),
        "a red circle left of a blue square": Spec("position", (red, Thing("blue", "square")), relation="left of"),
    }
    for caption, spec in specs.items():
        assert MINI.caption(spec) == caption


def test_another_world_has_another_grammar():
    grammar = Grammar(thing="one {shape}, {colour}", glue=("one",))
    other = replace(MINI, name="other", grammar=grammar, palette={"teal": (0, 128, 128)}, shapes=("ring",))
    assert other.caption(other.attribute_specs()[0]) == "one ring, teal"
    assert {"one", "ring", "teal"} <= set(other.grammar_words)
    assert "the" not in other.grammar_words
    assert other.revision == "other 1"


def test_the_tokenizer_knows_every_word_of_every_caption():
    said = {word for pool in MINI.pools.values() for spec in pool for word in re.findall("[a-z]+", MINI.caption(spec))}
    assert said == set(MINI.grammar_words)


def test_what_the_world_names_can_be_drawn_and_written():
    assert set(MINI.shapes) <= set(SHAPES)
    assert set("".join(MINI.words + MINI.held_out_words)) <= set(MINI.letters) <= set(GLYPHS)
    assert not set(MINI.words) & set(MINI.held_out_words)


@pytest.mark.parametrize("kind", ["place", "attribute", "position", "count", "word"])
def test_a_picture_is_fixed_by_its_generator_and_varies_with_it(kind):
    spec = MINI.pools[kind][3]
    one, two, other = (render(MINI, spec, np.random.default_rng(s)) for s in (1, 1, 2))
    assert one.shape == (64, 64, 3)
    assert one.dtype == np.uint8
    assert (one == two).all()
    assert (one != other).any()


@pytest.mark.parametrize("kind", ["place", "attribute", "position", "count", "word"])
def test_a_near_miss_is_another_spec_of_the_same_kind(kind, rng):
    for spec in MINI.pools[kind][:40]:
        miss = MINI.confuse(spec, rng)
        assert miss.kind == kind
        assert miss != spec


def test_crowded_counts_find_room(rng):
    for shape in MINI.shapes:
        for _ in range(20):
            render(MINI, Spec("count", (Thing("red", shape),) * 5), rng)


def test_grammar_words_are_single_tokens_and_words_are_spelled():
    tokenizer = build_tokenizer(MINI, "<|endoftext|>")
    for word in MINI.grammar_words:
        if len(word) > 2:
            assert tokenizer.tokenize(word) == [word + "</w>"]
    spelled = tokenizer.tokenize('the word "CAP" in red')
    assert spelled[2:7] == ['"</w>', "c", "a", "p</w>", '"</w>']
    longest = max(len(tokenizer(MINI.caption(s)).input_ids) for pool in MINI.pools.values() for s in pool)
    assert longest <= 16
