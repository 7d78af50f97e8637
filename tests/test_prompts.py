import json

import pytest

from marble import MarbleError
from marble.prompts import PromptMixture, Record, load_source
from marble.rules import split_by_share

SOURCES = ["mini-places", "mini-words", "mini-objects"]


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
