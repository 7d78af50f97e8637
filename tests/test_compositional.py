from collections import Counter

import pytest

from marble import MarbleError
from marble.prompts import load_source
from marble.prompts.coco import COLOURS, NAMES, RELATIONS, TASKS, targets_of
from marble.prompts.compositional import plural, with_article

TRAIN, HELD_OUT = (load_source("compositional", split) for split in ("train", "held-out"))
NUMBERS = {2: "two", 3: "three", 4: "four"}


def of_task(records, task):
    return [record for record in records if record.targets["task"] == task]


def test_the_words_are_cocos_and_genevals():
    assert len(NAMES) == len(set(NAMES)) == 80
    assert [NAMES[i] for i in (0, 9, 32, 49, 64, 65, 66, 67, 79)] == [
        "person",
        "traffic light",
        "sports ball",
        "orange",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "cell phone",
        "toothbrush",
    ]
    assert all(name == " ".join(name.split()) for name in NAMES)
    assert len(set(COLOURS)) == 10


def test_train_is_large_and_held_out_is_not_small():
    assert len(TRAIN) == 6000
    assert len({r.text for r in TRAIN}) == 3990  # 40 + 1000 + 200 + 750 + 1000 + 1000
    assert len(HELD_OUT) == len({r.text for r in HELD_OUT}) == 240
    assert {r.source for r in TRAIN + HELD_OUT} == {"compositional"}


def test_it_is_the_same_every_time_and_everywhere():
    assert load_source("compositional", "train") == TRAIN
    assert [r.text for r in HELD_OUT[:6]] == [
        "a photo of a chair",
        "a photo of a traffic light and a zebra",
        "a photo of two baseball gloves",
        "a photo of a brown car",
        "a photo of a parking meter left of a zebra",
        "a photo of an orange spoon and a brown cake",
    ]


def test_any_stretch_holds_the_six_tasks_equally():
    for records in (TRAIN, HELD_OUT):
        for start in (0, 1, 7, 100):
            assert Counter(r.targets["task"] for r in records[start : start + 60]) == dict.fromkeys(TASKS, 10)


def test_no_text_is_in_both():
    assert not {r.text for r in TRAIN} & {r.text for r in HELD_OUT}


@pytest.mark.parametrize("task", ["two_object", "position", "color_attr"])
def test_no_held_out_pair_of_classes_is_trained_on_in_its_task(task):
    pairs = [
        {frozenset(o["name"] for o in r.targets["objects"]) for r in of_task(rs, task)} for rs in (TRAIN, HELD_OUT)
    ]
    assert all(len(pair) == 2 for pair in pairs[0] | pairs[1])
    assert not pairs[0] & pairs[1]


def test_all_words_are_in_use():
    train = [o for r in TRAIN for o in r.targets["objects"]]
    assert {o["name"] for o in train} == set(NAMES)
    assert {o.get("colour") for o in train} == {*COLOURS, None}
    assert not any(
        o["name"] == "person" and "colour" in o for o in train + [o for r in HELD_OUT for o in r.targets["objects"]]
    )
    assert {o["count"] for r in of_task(TRAIN, "counting") for o in r.targets["objects"]} == {2, 3, 4}
    relations = Counter(r.targets["relation"][0] for r in of_task(TRAIN, "position"))
    assert set(relations) == set(RELATIONS)
    assert min(relations.values()) > 200


def test_articles_and_plurals_are_genevals():
    assert [with_article(name) for name in ("bench", "apple", "umbrella", "hair drier")] == [
        "a bench",
        "an apple",
        "an umbrella",
        "a hair drier",
    ]
    assert [plural(name) for name in ("dog", "bus", "skis", "bench")] == ["dogs", "buses", "skises", "benchs"]


def rewritten(record):
    """The text that GenEval's form gives for these targets."""
    targets = record.targets
    objects = targets["objects"]
    if targets["task"] == "counting":
        return f"a photo of {NUMBERS[objects[0]['count']]} {plural(objects[0]['name'])}"
    words = [with_article(f"{o['colour']} {o['name']}" if "colour" in o else o["name"]) for o in objects]
    if "relation" in targets:
        relation, i, j = targets["relation"]
        return f"a photo of {words[i]} {relation} {words[j]}"
    return "a photo of " + " and ".join(words)


def as_metadata(record):
    """The line of GenEval's own metadata for these targets."""
    targets = record.targets
    include = []
    for i, o in enumerate(targets["objects"]):
        clause = {"class": o["name"], "count": o["count"]}
        if "colour" in o:
            clause["color"] = o["colour"]
        if "relation" in targets and targets["relation"][1] == i:
            clause["position"] = [targets["relation"][0], targets["relation"][2]]
        include.append(clause)
    line = {"tag": targets["task"], "include": include, "prompt": record.text}
    if "exclude" in targets:
        line["exclude"] = [{"class": o["name"], "count": o["count"]} for o in targets["exclude"]]
    return line


def test_texts_say_what_the_targets_ask_for():
    for record in TRAIN + HELD_OUT:
        assert rewritten(record) == record.text
        assert targets_of(as_metadata(record)) == record.targets
        if record.targets["task"] == "counting":
            wanted, excluded = record.targets["objects"][0], record.targets["exclude"]
            assert excluded == [{"name": wanted["name"], "count": wanted["count"] + 1}]
        else:
            assert all(o["count"] == 1 for o in record.targets["objects"])
            assert "exclude" not in record.targets


def test_other_splits_are_refused():
    with pytest.raises(MarbleError, match='the split must be train or held-out, got "test"'):
        load_source("compositional", "test")


BENCH = {"class": "bench", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], r"must be an object, got \[\]"),
        ({"include": [BENCH]}, 'tag must be one of GenEval\'s 6, got "None"'),
        ({"tag": "color", "include": [BENCH]}, 'got "color". Did you mean "colors"'),
        ({"tag": "colors"}, "include must name at least one object"),
        ({"tag": "colors", "include": BENCH}, "include must be a list of objects"),
        ({"tag": "colors", "include": [{"class": "tv remotes", "count": 1}]}, 'Did you mean "tv remote"'),
        ({"tag": "colors", "include": [{"class": "bench"}]}, r"include\[0\].count must be a whole number"),
        ({"tag": "colors", "include": [{**BENCH, "count": 0}]}, "of at least 1, got 0"),
        ({"tag": "colors", "include": [{**BENCH, "color": "teal"}]}, r'include\[0\].color must be .* got "teal"'),
        ({"tag": "colors", "include": [{**BENCH, "colour": "red"}]}, 'unknown key "colour"'),
        ({"tag": "position", "include": [{**BENCH, "position": ["above", 0]}]}, "a clause before its own, got 0"),
        ({"tag": "position", "include": [BENCH, {**BENCH, "position": ["near", 0]}]}, 'got "near"'),
        ({"tag": "position", "include": [BENCH, {**BENCH, "position": "above"}]}, r"must be \[relation, clause\]"),
        (
            {"tag": "position", "include": [BENCH, *[{**BENCH, "position": ["above", 0]}] * 2]},
            r"include\[2\].position is a second one",
        ),
        ({"tag": "counting", "include": [BENCH], "exclude": [{"class": "bench"}]}, r"exclude\[0\].count must be"),
        ({"tag": "counting", "include": [BENCH], "exclude": [{**BENCH, "color": "red"}]}, 'unknown key "color"'),
    ],
)
def test_metadata_of_another_form_is_refused(metadata, message):
    with pytest.raises(MarbleError, match=message):
        targets_of(metadata)
