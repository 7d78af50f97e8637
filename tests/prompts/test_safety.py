"""What the safety filter leaves out, and what not."""

import logging

import pytest

from marble import MarbleError
from marble.config import PromptSource
from marble.prompts import load_source
from marble.prompts.safety import unsafe

from .writing import folder, texts, things, written

HARMLESS = """
the Essex countryside in summer|a cocktail with a cherry|grapes on a plate|an assassin in a dark hood
Dick Tracy comic cover|a peacock in a garden|Middlesex railway station|an analog camera|cumulus clouds at dusk
a naked mole-rat in a burrow|Moby-Dick, the white whale|chicken breasts on a grill|two blue tits on a branch
a 17 year old oak tree|a child eating an apple|a bloody mary with celery|a comic strip|a therapist's office
a shuttlecock in flight|a brass sextant|Scunthorpe town hall|a Gore-Tex jacket|graduation, magna cum laude
a boy with a wooden bow|a teddy bear for a baby|teenage turtles in a sewer|3d render, 4k, 8k
a see-through glass teapot|a weathercock on a barn|cockpit of an aeroplane|titanium watch|a canal in Venice
a grapefruit|the class of 1984|an embassy|a bassoon|Sussex|a sperm whale under ice|a rape field in bloom
a pussy willow branch|Michelangelo's David in a museum|a mother nursing her baby|boys playing football
a girl reading under a tree|x-ray of a hand|a b c written on a board|C A T in wooden letters|passionate opera singer
hot dogs and mustard|a butterfly, hardcover book
"""


@pytest.mark.parametrize("text", [text for line in HARMLESS.strip().splitlines() for text in line.split("|")])
def test_harmless_texts_are_kept(text):
    assert unsafe(text) is None


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("a nude figure", "nudity"),
        ("A NUDE FIGURE", "nudity"),
        ("nüdé figure", "nudity"),
        ("n00d figure", "nudity"),
        ("nuuuude figure", "nudity"),
        ("n.u.d.e figure", "nudity"),
        ("a n u d e figure", "nudity"),
        ("nu-de figure", "nudity"),
        ("nu\u200bde figure", "nudity"),
        ("nudes, oil on canvas", "nudity"),
        ("a man without any clothes", "nudity"),
        ("pr0n", "sexual"),
        ("a sexy pose", "sexual"),
        ("s3xy pose", "sexual"),
        ("erotica", "sexual"),
        ("a woman in lingerie", "sexual"),
        ("covered in blood", "gore"),
        ("a dismembered statue", "gore"),
        ("gore, severed head", "gore"),
        ("a sexy teen", "minors"),
        ("nude child", "minors"),
        ("1girl, nude", "minors"),
        ("s e x y schoolgirl", "minors"),
        ("17yo in lingerie", "minors"),
        ("sixteen years old, topless", "minors"),
        ("a sexy 16-year-old", "minors"),
        ("a little girl in a bikini", "minors"),
        ("a sexy 34 year old", "sexual"),
        ("loli", "minors"),
    ],
)
def test_unsafe_texts_are_named_by_category(text, category):
    assert unsafe(text) == category


MIXED = ["a cat", "a dog", "a nude figure", "nude child", *things(*range(8))]


def test_the_filter_is_on_and_says_how_many(tmp_path, caplog):
    path = written(tmp_path / "a.txt", MIXED)
    with caplog.at_level(logging.WARNING, "marble"):
        assert texts(path) == ["a dog", *things(0, 2, 3, 4, 5, 7)]
        assert texts(path, "held-out") == ["a cat", "thing 1", "thing 6"]
    (record,) = caplog.records  # one line for both splits
    assert "the safety filter left out 2 of 12 prompts (minors 1, nudity 1)" in record.getMessage()
    assert "safe: false" in record.getMessage()
    assert "figure" not in record.getMessage()


def test_what_is_held_out_does_not_depend_on_the_filter_and_minors_never_pass(tmp_path):
    use = PromptSource(source=written(tmp_path / "a.txt", MIXED), safe=False)
    assert texts(use) == ["a dog", "a nude figure", *things(0, 2, 3, 4, 5, 7)]
    assert texts(use, "held-out") == ["a cat", "thing 1", "thing 6"]


def test_data_sets_are_filtered_too(tmp_path):
    source = folder(tmp_path / "mine", train=[{"prompt": text} for text in MIXED])
    assert "a nude figure" not in texts(source)
    assert "a nude figure" in texts(PromptSource(source=source, safe=False))
    assert not {"nude child"} & {*texts(PromptSource(source=source, safe=False))}


def test_nothing_left_is_an_error(tmp_path):
    path = written(tmp_path / "a.txt", [f"nude number {i}" for i in range(6)])
    with pytest.raises(MarbleError, match=r"the safety filter left out all 6 prompts; safe: false keeps"):
        load_source(path, "train")


def test_our_own_prompts_are_safe():
    for source in ("text-rendering", "compositional"):
        for split in ("train", "held-out"):
            assert not [text for text in texts(source, split) if unsafe(text)]
