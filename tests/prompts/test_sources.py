"""Files and functions as prompts, and what is held out of one source and of several."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marble import MarbleError, Record
from marble.config import PromptSource, make_config
from marble.prompts import load_mixture, load_source
from marble.prompts.data_sets import DataSet
from marble.prompts.sources import same_as
from marble.setup import check_config, held_out_prompts

from .writing import texts, things, written

GENEVAL = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benchs"}


# ---- files ----------------------------------------------------------------------------------------------------


def test_every_fifth_different_prompt_is_held_out_however_a_repetition_is_spelt(tmp_path):
    lines = ["A cat", "a  CAT.", "dog", "“A cat”", *things(*range(8))]
    path = written(tmp_path / "a.txt", lines)
    assert texts(path, "held-out") == ["A cat", "thing 3"]  # cat, dog, 0, 1, 2 | 3, …
    assert texts(path) == ["dog", *things(0, 1, 2, 4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("A cat", " a\tCAT ", True),
        ("a cat", "a cat.", True),
        ("a cat", '"a cat!"', True),
        ("straße", "STRASSE", True),
        ("ﬁne", "fine", True),
        ("a cat", "a cats", False),
        ("a cat, a dog", "a cat a dog", False),
        ("!!!", "???", False),
    ],
)
def test_what_counts_as_the_same_text(one, two, same):
    assert (same_as(one) == same_as(two)) == same


def test_lines_of_geneval_and_of_other_forms(tmp_path):
    rows = [
        {"text": 'a sign "A"', "targets": {"text": "A"}},
        GENEVAL,
        {"prompt": "a cat"},
        {"caption": "a dog", "url": "x"},
        {"prompt": "a b", "targets": {"text": "b"}, "tag": "colors"},
        {"text": "a text with a line\u2028separator"},
    ]
    path = written(tmp_path / "a.jsonl", rows)
    train = load_source(path, "train")
    assert [record.targets for record in train] == [
        {"task": "counting", "objects": [{"name": "bench", "count": 2}]},
        {},
        {},
        {"text": "b"},
    ]
    assert [record.text for record in train] == ["a photo of two benchs", "a cat", "a dog", "a b"]
    assert texts(path, "held-out") == ['a sign "A"', "a text with a line\u2028separator"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not of the form"),
        ("[1, 2]", "line 2: not of the form"),
        ({"title": "a"}, "text must be a text, got None"),
        ({"prompt": 5}, "prompt must be a text, got 5"),
        ({"text": " "}, "text must be a text, got ' '"),
        ({"text": "a", "targets": [1]}, r"targets must be a mapping, got \[1\]"),
        ({**GENEVAL, "tag": "color"}, 'line 2: GenEval metadata: tag must be .* Did you mean "colors"'),
    ],
)
def test_lines_that_will_not_do(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", [{"text": "good"}, line])
    with pytest.raises(MarbleError, match=message):
        load_source(path, "train")


def test_a_file_of_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(MarbleError, match=r'a.txt" is not UTF-8'):
        load_source(str(tmp_path / "a.txt"), "train")
    (tmp_path / "b.txt").write_bytes("\ufeffcafé\r\n".encode() + b"\n".join(b"x%d" % i for i in range(4)))
    assert texts(str(tmp_path / "b.txt"), "held-out") == ["café"]


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    written(path, things(*range(5)))
    assert texts(str(path)) == things(1, 2, 3, 4)
    reads = []
    read_text = type(path).read_text
    monkeypatch.setattr(type(path), "read_text", lambda self, **k: reads.append(self) or read_text(self, **k))
    load_source(str(path), "train").clear()  # a caller's list is its own
    assert texts(str(path)) == things(1, 2, 3, 4)
    assert not reads
    written(path, things(*range(10, 15)))
    os.utime(path, ns=(1, 1))
    assert texts(str(path)) == things(11, 12, 13, 14)
    assert reads == [path]


def test_settings_of_data_sets_are_refused_elsewhere(tmp_path):
    path = written(tmp_path / "a.txt", things(*range(5)))
    with pytest.raises(MarbleError, match=r'a.txt": column is for hf: data sets; leave it out'):
        load_source(PromptSource(source=path, column="text"), "train")
    with pytest.raises(MarbleError, match=r"split is for hf:"):
        load_source(PromptSource(source="pickscore", split="test"), "train")
    assert len(load_source(PromptSource(source=path, split="train"), "train")) == 4  # written out, but as it is


# ---- several sources ------------------------------------------------------------------------------------------


def test_what_one_source_holds_out_another_does_not_train_on(tmp_path):
    one = written(tmp_path / "one.txt", things(*range(10)))  # holds out 0 and 5
    two = written(tmp_path / "two.txt", things(3, 0, 7, 5, 8, 9))  # holds out 3 and 9
    train, held_out = load_mixture([PromptSource(source=one), PromptSource(source=two)])
    assert [[r.text for r in part] for part in held_out] == [things(0, 5), things(3, 9)]
    assert [[r.text for r in part] for part in train] == [things(1, 2, 4, 6, 7, 8), things(7, 8)]


def test_a_source_of_which_nothing_is_left(tmp_path):
    one = written(tmp_path / "one.txt", [f"{'kept' if i % 5 == 0 else 'other'} {i}" for i in range(20)])
    two = written(tmp_path / "two.txt", ["mine", "kept 0", "kept 5", "kept 10", "kept 15"])
    with pytest.raises(MarbleError, match=r"two.txt.*every prompt of its train split is held out by a source"):
        load_mixture([PromptSource(source=one), PromptSource(source=two)])


SPELLINGS = (str, str.upper, str.title, lambda t: f"  {t} ", lambda t: t.replace(" ", "\t  "), lambda t: f"“{t}.”")
LINES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(range(len(SPELLINGS)))), min_size=5, max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(files=st.lists(LINES, min_size=1, max_size=4))
def test_nothing_held_out_is_trained_on_however_it_is_spelt(tmp_path, files):
    uses = []
    for i, lines in enumerate(files):
        fresh = [(100 * (i + 1) + n, 0) for n in range(10)]  # so that something is always left
        spelt = [SPELLINGS[how](f"thing number {number}") for number, how in [*lines, *fresh]]
        path = tmp_path / f"{i}.{'txt' if i % 2 else 'jsonl'}"
        path.unlink(missing_ok=True)
        uses.append(PromptSource(source=written(path, spelt if i % 2 else [{"text": line} for line in spelt])))
    train, held_out = load_mixture(uses)
    number = [
        [[int("".join(c for c in r.text if c.isdigit())) for r in part] for part in both] for both in (train, held_out)
    ]
    assert not {n for part in number[0] for n in part} & {n for part in number[1] for n in part}
    earlier = set()
    for i, (kept, held) in enumerate(zip(*number, strict=True)):
        assert kept
        assert len(set(kept + held)) == len(kept + held)  # once each
        there = {n for n, _ in files[i]} | {100 * (i + 1) + n for n in range(10)}
        own = [int("".join(c for c in r.text if c.isdigit())) for r in load_source(uses[i], "held-out")]
        assert len(own) == -(-len(there) // 5)
        assert held == [n for n in own if n not in earlier]  # one that two sources hold out is held out once
        earlier |= set(own)
        assert there - {n for part in number[1] for n in part} == set(kept)  # and nothing else is lost


def plain_texts(split):
    return [f"{split} {n}" for n in range(3)]


def mappings(split):
    return [{"text": f"{split} {n}", "targets": {"text": "A"}} for n in range(2)]


def records(split):
    return [Record(f"a {split}", targets={"text": "A"})]


def nothing(split):
    return None


def numbers(split):
    return [1, 2]


def no_argument():
    return []


def test_prompt_functions_may_return_texts_mappings_or_records():
    assert load_source(f"{__name__}:plain_texts", "train")[0] == Record("train 0", f"{__name__}:plain_texts")
    assert load_source(f"{__name__}:mappings", "held-out")[1].targets == {"text": "A"}
    assert load_source(f"{__name__}:records", "train") == [Record("a train", f"{__name__}:records", {"text": "A"})]


@pytest.mark.parametrize("name", ["nothing", "numbers", "no_argument"])
def test_prompt_functions_that_do_otherwise(name):
    with pytest.raises(MarbleError, match=rf'prompt source ".*:{name}" fails for "train": .* it must be a function of'):
        load_source(f"{__name__}:{name}", "train")


def test_the_same_prompt_with_other_targets_is_told_of(tmp_path, caplog):
    rows = [{"text": f"prompt {n}", "targets": {"text": "A"}} for n in range(6)]
    rows.append({"text": "Prompt 3.", "targets": {"text": "B"}})
    train = load_source(written(tmp_path / "twice.jsonl", rows), "train")
    assert "twice: 1 prompts stand there again with other targets" in caplog.text
    assert next(r for r in train if r.text == "prompt 3").targets == {"text": "A"}


# ---- in a run -------------------------------------------------------------------------------------------------


def run_config(*sources, rewards=("sharpness",)):
    return make_config(
        {
            "prompts": [{"source": source, "share": 1} for source in sources],
            "rewards": [{"reward": reward} for reward in rewards],
            "rollout": {"prompts": 4, "group_size": 2, "steps": 4},
            "objective": {"timesteps": 2},
            "evaluation": {"prompts": 4},
        }
    )


def test_a_run_holds_out_across_its_sources(tmp_path):
    one = written(tmp_path / "one.txt", things(*range(10)))
    two = written(tmp_path / "two.txt", things(3, 0, 7, 5, 8, 9))
    config = run_config(one, two)
    assert check_config(config) == []
    assert [r.text for r in held_out_prompts(config)] == ["thing 0", "thing 3", "thing 5", "thing 9"]


def test_held_out_prompts_are_in_the_training_shares_or_even(tmp_path):
    common = written(tmp_path / "common.txt", things(*range(40)))
    rare = written(tmp_path / "rare.txt", things(*range(40, 80)))
    values = run_config(common, rare).model_dump(mode="json")
    values["prompts"][0]["share"] = 3

    def counts(mixture):
        values["evaluation"]["mixture"] = mixture
        sources = [record.source for record in held_out_prompts(make_config(values))]
        return sources.count("common"), sources.count("rare")

    assert counts("shares") == (3, 1)
    assert counts("even") == (2, 2)


def test_a_check_that_may_not_download_passes_over_what_it_would(tmp_path, monkeypatch):
    monkeypatch.setattr(DataSet, "read", lambda self, split: pytest.fail("downloads"))
    few = written(tmp_path / "few.txt", things(*range(5)))
    enough = written(tmp_path / "enough.txt", things(*range(20)))
    assert check_config(run_config("pickscore", enough), fetch=False) == ["pickscore"]
    # what is here is checked: a source with too little held out, but not which prompts a reward can judge
    with pytest.raises(MarbleError, match=r"asks for 2 held-out prompts of .*few.txt.*, which has 1"):
        check_config(run_config("pickscore", few), fetch=False)
    assert check_config(run_config("hf:owner/name", rewards=["mini-text"]), fetch=False) == ["hf:owner/name"]
    with pytest.raises(MarbleError, match="rewards: text applies to no prompt of enough"):
        check_config(run_config(enough, rewards=["mini-text"]), fetch=False)
