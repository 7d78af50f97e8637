"""Files and data sets as prompts, what is held out of them, and what the safety filter leaves out."""

import builtins
import json
import logging
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marble import MarbleError
from marble.config import PromptSource, make_config
from marble.prompts import load_mixture, load_source, needs_download
from marble.prompts.data_sets import DataSet, pickscore
from marble.prompts.safety import unsafe
from marble.prompts.sources import same_as
from marble.setup import check_config, held_out_prompts

GENEVAL = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benchs"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` makes of files goes into a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def things(*numbers):
    return [f"thing {n}" for n in numbers]


def written(path, lines):
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def texts(source, split="train"):
    return [record.text for record in load_source(source, split)]


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
    with pytest.raises(MarbleError, match=r"prompts.N.column: is for hf: data sets, got source .*a.txt"):
        load_source(PromptSource(source=path, column="text"), "train")
    with pytest.raises(MarbleError, match=r"prompts.N.split: is for hf:"):
        load_source(PromptSource(source="pickscore", split="test"), "train")
    assert len(load_source(PromptSource(source=path, split="train"), "train")) == 4  # written out, but as it is


# ---- data sets ------------------------------------------------------------------------------------------------


def folder(path, **splits):
    path.mkdir()
    for split, rows in splits.items():
        written(path / f"{split}.jsonl", rows)
    return f"hf:{path}"


def test_a_data_set_of_a_folder(tmp_path):
    rows = [{"caption": text, "uid": i} for i, text in enumerate(["A cat", "a cat.", *things(*range(5))])]
    source = folder(tmp_path / "mine", train=rows)
    assert texts(source, "held-out") == ["A cat", "thing 4"]
    assert texts(source) == things(0, 1, 2, 3)
    assert {r.source for r in load_source(source, "train")} == {"mine"}
    assert not needs_download(source)


def test_splits_of_a_data_set(tmp_path):
    train = [{"prompt": text} for text in things(0, 1, 2, 3)]
    test = [{"prompt": text} for text in ("THING 2", "thing 9", None, " ")]
    source = folder(tmp_path / "mine", train=train, test=test)
    use = PromptSource(source=source, held_out_split="test")
    assert texts(use, "held-out") == ["THING 2", "thing 9"]
    assert texts(use) == things(0, 1, 3)  # what the other split holds out is not trained on
    assert texts(PromptSource(source=source, split="test", held_out_split="train")) == ["thing 9"]


def test_a_column_by_name_and_by_itself(tmp_path):
    rows = [{"id": f"id {i}", "prompt": f"prompt {i}", "text": f"text {i}"} for i in range(5)]
    source = folder(tmp_path / "mine", train=rows)
    assert texts(source)[0] == "prompt 1"
    assert texts(PromptSource(source=source, column="id"))[0] == "id 1"
    with pytest.raises(MarbleError, match=r'no column "texts". Did you mean "text".* Columns: id, prompt, text'):
        load_source(PromptSource(source=source, column="texts"), "train")
    other = folder(tmp_path / "other", train=[{"id": i, "words": ["a"]} for i in range(5)])
    with pytest.raises(MarbleError, match=r"called prompt, text or caption; say which .* Columns: id, words"):
        load_source(other, "train")
    with pytest.raises(MarbleError, match='column "id" holds int64, not texts'):
        load_source(PromptSource(source=other, column="id"), "train")
    with pytest.raises(MarbleError, match='column "words" holds lists, not texts'):
        load_source(PromptSource(source=other, column="words"), "train")


def test_targets_of_data_sets(tmp_path):
    rows = [{"text": f't "{i}"', "targets": {"text": str(i)} if i else {"objects": [{"name": "x"}]}} for i in range(6)]
    source = folder(tmp_path / "ours", train=rows)
    assert [r.targets for r in load_source(source, "train")] == [{"text": str(i)} for i in (1, 2, 3, 4)]
    assert load_source(source, "held-out")[0].targets == {"objects": [{"name": "x"}]}
    as_json = [{"text": f"t {i}", "targets": json.dumps({"text": str(i)})} for i in range(5)]
    assert load_source(folder(tmp_path / "json", train=as_json), "train")[0].targets == {"text": "1"}
    metadata = [
        {**GENEVAL, "prompt": f"benchs {i}", "exclude": [{"class": "bench", "count": 3}] if i % 2 else []}
        for i in range(4)
    ]
    coloured = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"}
    geneval = load_source(folder(tmp_path / "geneval", train=[*metadata, coloured]), "train")
    assert geneval[0].targets["exclude"] == [{"name": "bench", "count": 3}]
    assert geneval[1].targets == {"task": "counting", "objects": [{"name": "bench", "count": 2}]}
    assert geneval[3].targets == {"task": "colors", "objects": [{"name": "cat", "count": 1, "colour": "red"}]}
    wrong = folder(tmp_path / "wrong", train=[*metadata, {**coloured, "tag": "color"}])
    with pytest.raises(MarbleError, match=r"split train, row 4: GenEval metadata: tag must be"):
        load_source(wrong, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, r'split "valid": Unknown split "valid". Should be one of \[.train.\]'),
        ({"subset": "small"}, r'subset "small", split "train": .*small.* not found'),
        ({"held_out_split": "test"}, r'split "test": Unknown split'),
    ],
)
def test_what_a_data_set_lacks(tmp_path, settings, message):
    source = folder(tmp_path / "mine", train=[{"prompt": text} for text in things(*range(5))])
    with pytest.raises(MarbleError, match=message) as error:
        load_source(PromptSource(source=source, **settings), "train")
    assert "\n" not in str(error.value)


def test_data_sets_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(MarbleError, match=f'data set "{tmp_path}/none": there is no such folder'):
        load_source(f"hf:{tmp_path}/none", "train")
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MarbleError, match=r'cannot load the data set "nobody/nothing", split "train": Couldn') as error:
        load_source("hf:nobody/nothing", "train")
    assert "\n" not in str(error.value)


def test_without_the_package(tmp_path, monkeypatch):
    source = folder(tmp_path / "mine", train=[{"prompt": text} for text in things(*range(5))])
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MarbleError, match=r'needs datasets: pip install "marble-diffusion\[rewards\]"'):
        load_source(source, "train")


def test_pickscore_is_a_data_set_of_the_hub(tmp_path):
    assert needs_download("pickscore")
    assert needs_download("hf:owner/name")
    assert not needs_download("mini-words")
    assert not needs_download("prompts.txt")
    assert pickscore.path == "yuvalkirstain/pickapic_v1_no_images"
    assert (pickscore.column, pickscore.split, pickscore.held_out_split) == ("caption", "train", "test_unique")
    rows = [{"caption": text, "are_different": True} for text in ("a cat", "a dog", "a dog", "a nude", "an owl")]
    path = folder(tmp_path / "pick", train=rows, test_unique=rows[:1]).removeprefix("hf:")
    local = DataSet(path, "pickscore", column=pickscore.column, held_out_split=pickscore.held_out_split)
    assert [record.text for record in local.read("train")] == ["a cat", "a dog", "a nude", "an owl"]


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
    for i, (kept, held) in enumerate(zip(*number, strict=True)):
        assert kept
        assert len(set(kept + held)) == len(kept + held)  # once each
        there = {n for n, _ in files[i]} | {100 * (i + 1) + n for n in range(10)}
        assert len(held) == -(-len(there) // 5)
        assert there - {n for part in number[1] for n in part} == set(kept)  # and nothing else is lost


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


# ---- safety ---------------------------------------------------------------------------------------------------


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
    assert "prompts.N.safe: false" in record.getMessage()
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
    with pytest.raises(MarbleError, match=r"the safety filter left out all 6 prompts; prompts.N.safe: false keeps"):
        load_source(path, "train")


def test_our_own_prompts_are_safe():
    for source in ("text-rendering", "compositional"):
        for split in ("train", "held-out"):
            assert not [text for text in texts(source, split) if unsafe(text)]
