import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble import MarbleError
from marble.prompts import PromptMixture, Record, load_source
from marble.rules import split_by_share

SOURCES = ["mini-places", "mini-words", "mini-objects", "compositional", "text-rendering"]


@pytest.mark.parametrize("source", SOURCES)
def test_train_and_held_out_share_no_prompt(source):
    train, held_out = (load_source(source, split) for split in ("train", "held-out"))
    assert train
    assert held_out
    assert not {r.text for r in train} & {r.text for r in held_out}


def test_held_out_words_are_new_words_not_new_colours():
    words = [{r.targets["text"] for r in load_source("mini-words", split)} for split in ("train", "held-out")]
    assert not words[0] & words[1]


def test_any_stretch_of_objects_holds_the_three_kinds_equally():
    records = load_source("mini-objects", "held-out")[:12]
    assert sum("relation" in r.targets for r in records) == 4
    assert sum(r.targets["objects"][0]["count"] > 1 for r in records) == 4


def mixture(**changes):
    sources = [([Record(f"{s}{i}", s) for i in range(n)], share) for s, n, share in (("a", 5, 2.0), ("b", 7, 1.0))]
    return PromptMixture(sources, **{"prompts": 6, "group_size": 3, "seed": 0, **changes})


def test_shares_groups_and_seeds():
    batch = mixture().batch(0)
    assert [r.source for r in batch.prompts] == ["a"] * 4 + ["b"] * 2
    assert len(batch.records) == len(batch.seeds) == 18
    assert batch.group_ids.tolist() == [g for g in range(6) for _ in range(3)]
    assert [batch.prompts[g] for g in batch.group_ids.tolist()] == batch.records
    assert len(set(batch.seeds)) == 18


def test_parts_hold_whole_groups_and_know_where_they_stand():
    whole = mixture().batch(0)
    parts = [whole.part(own) for own in (range(4), range(4, 5), range(5, 6), range(6, 6))]
    assert [r for part in parts for r in part.records] == whole.records
    assert [seed for part in parts for seed in part.seeds] == whole.seeds
    assert [list(part.images) for part in parts] == [list(range(12)), [12, 13, 14], [15, 16, 17], []]


def test_a_source_is_used_up_before_it_repeats():
    mix = mixture()
    seen = [r.text for e in range(5) for r in mix.batch(e).prompts if r.source == "a"]
    for lap in range(4):
        assert len(set(seen[lap * 5 : lap * 5 + 5])) == 5


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    prompts=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_every_batch_has_its_shares_and_no_prompt_comes_again_before_its_source_is_used_up(
    sizes, shares, prompts, seed
):
    records = [[Record(f"{s}/{i}", str(s)) for i in range(size)] for s, size in enumerate(sizes)]
    shares = shares[: len(sizes)]
    mix = PromptMixture(list(zip(records, shares, strict=True)), prompts=prompts, group_size=2, seed=seed)
    batches = [mix.batch(epoch).prompts for epoch in range(4)]
    exact = [share * prompts / sum(shares) for share in shares]
    for batch in batches:
        counts = Counter(record.source for record in batch)
        assert counts == Counter(record.source for record in batches[0])
        assert sum(counts.values()) == prompts
        assert all(abs(counts[str(s)] - share) < 1 for s, share in enumerate(exact))
    for s, size in enumerate(sizes):
        walked = [record.text for batch in batches for record in batch if record.source == str(s)]
        for start in range(0, len(walked), size):  # whole laps, and the beginning of one
            lap = walked[start : start + size]
            assert len(set(lap)) == len(lap)


def test_an_epoch_depends_on_the_seed_and_its_number_alone():
    assert mixture().batch(7) == mixture().batch(7)
    assert mixture().batch(7) != mixture().batch(8)
    assert mixture().batch(7) != mixture(seed=1).batch(7)


@pytest.mark.parametrize(("shares", "total"), [([1, 1, 1], 10), ([5, 1], 7), ([0.1, 0.2, 0.7], 3), ([1], 4)])
def test_split_by_share(shares, total):
    counts = split_by_share(shares, total)
    assert sum(counts) == total
    assert all(abs(c - s * total / sum(shares)) < 1 for c, s in zip(counts, shares, strict=True))


def test_text_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(["a cat", "", "a dog", "a cat", *(f"thing {i}" for i in range(10))]))
    train, held_out = load_source(str(path), "train"), load_source(str(path), "held-out")
    assert {r.text for r in train} | {r.text for r in held_out} == {
        "a cat",
        "a dog",
        *(f"thing {i}" for i in range(10)),
    }
    assert not {r.text for r in train} & {r.text for r in held_out}
    assert train[0].source == "mine"


def test_jsonl_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"text": f'the word "W{i}"', "targets": {"text": f"W{i}"}} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_source(str(path), "train")[0].targets == {"text": "W1"}
    path.write_text('{"text": "a"}\nnot json')
    with pytest.raises(MarbleError, match="line 2"):
        load_source(str(path), "train")


def test_files_that_will_not_do(tmp_path):
    with pytest.raises(MarbleError, match="does not exist"):
        load_source(str(tmp_path / "none.txt"), "train")
    (tmp_path / "few.txt").write_text("one\ntwo")
    with pytest.raises(MarbleError, match="at least 5"):
        load_source(str(tmp_path / "few.txt"), "train")


def test_unknown_source():
    with pytest.raises(MarbleError, match='Did you mean "mini-words"'):
        load_source("mini-word", "train")


# ---- texts to write -------------------------------------------------------------------------------------


def test_texts_to_write():
    train, held_out = (load_source("text-rendering", split) for split in ("train", "held-out"))
    assert 2000 < len(train) < 5000
    assert 200 < len(held_out) < 1000
    assert load_source("text-rendering", "train") == train
    assert len({r.text for r in train + held_out}) == len(train + held_out)
    for record in train + held_out:
        assert record.source == "text-rendering"
        assert record.text.split('"')[1::2] == [record.targets["text"]]  # the only thing in quotes
        assert 1 <= len(record.targets["text"].split()) <= 4
    for records in (train, held_out[:60]):
        lengths = Counter(len(r.targets["text"].split()) > 1 for r in records)
        assert min(lengths.values()) > 0.2 * len(records)
        cases = Counter(r.targets["text"].isupper() + 2 * r.targets["text"].islower() for r in records)
        assert min(cases[kind] for kind in (0, 1, 2)) > 0.1 * len(records)


def test_no_text_to_write_that_is_held_out_stands_in_a_train_prompt():
    train, held_out = (load_source("text-rendering", split) for split in ("train", "held-out"))
    prompts = {f" {' '.join(''.join(c if c.isalnum() else ' ' for c in r.text).lower().split())} " for r in train}
    for text in {r.targets["text"].lower() for r in held_out}:
        assert not any(f" {text} " in prompt for prompt in prompts), text


def test_texts_to_write_are_the_same_everywhere():
    assert [r.text for r in load_source("text-rendering", "held-out")[:3]] == [
        'A laptop on a train table showing "Sing Along" in plain letters',
        'A brick wall with "Ocean" sprayed on it in bright colours',
        'A bakery display with a small flag that says "game over"',
    ]
    with pytest.raises(MarbleError, match='must be train or held-out, got "test"'):
        load_source("text-rendering", "test")
