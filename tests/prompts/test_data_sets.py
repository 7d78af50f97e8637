"""Data sets as prompts."""

import builtins
import json

import pytest

from marble import MarbleError
from marble.config import PromptSource
from marble.prompts import load_source, needs_download
from marble.prompts.data_sets import DataSet, pickscore

from .writing import folder, texts, things

GENEVAL = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benchs"}


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
