import math

import pytest

from marble.prompts.coco import targets_of
from marble.rewards.geneval.logic import Asked, Found, decide, relations

LEFT, RIGHT, FAR = (0, 0, 10, 10), (40, 0, 50, 10), (80, 0, 90, 10)
SINGLE = {"task": "single_object", "objects": [{"name": "bench", "count": 1}]}
TWO = {"task": "two_object", "objects": [{"name": "bench", "count": 1}, {"name": "cat", "count": 1}]}
THREE = {
    "task": "counting",
    "objects": [{"name": "bench", "count": 3}],
    "exclude": [{"name": "bench", "count": 4}],
}
RED = {"task": "colors", "objects": [{"name": "bench", "count": 1, "colour": "red"}]}
THREE_RED = {"task": "colors", "objects": [{"name": "bench", "count": 3, "colour": "red"}]}
# a dog left of a bench
PLACED = {
    "task": "position",
    "objects": [{"name": "bench", "count": 1}, {"name": "dog", "count": 1}],
    "relation": ["left of", 1, 0],
}
RED_BENCH_BLUE_DOG = {
    "task": "color_attr",
    "objects": [{"name": "bench", "count": 1, "colour": "red"}, {"name": "dog", "count": 1, "colour": "blue"}],
}
# a blue dog left of a red bench
ALL = {**RED_BENCH_BLUE_DOG, "relation": ["left of", 1, 0]}


def things(count, colour=None, box=LEFT):
    return [Found(box, colour)] * count


def verdict(targets, found, margin=0.1):
    wanted = Asked.of(targets)
    assert wanted is not None
    return decide(wanted, found, margin)


@pytest.mark.parametrize(
    ("targets", "found", "accuracy", "strict", "credit"),
    [
        (SINGLE, {"bench": things(1)}, 1, 1, 1),
        (SINGLE, {"cat": things(1)}, 0, 0, 0),  # 1 − 1/1
        (SINGLE, {"bench": things(1), "cat": things(2)}, 1, 1, 1),
        (SINGLE, {"bench": things(2)}, 1, 0, 0),  # enough for the benchmark; 1 − |1 − 2| / 1
        (SINGLE, {"bench": things(4)}, 1, 0, -2),  # 1 − 3/1
        (TWO, {"bench": things(1), "cat": things(1)}, 1, 1, 1),
        (TWO, {"bench": things(1), "dog": things(1)}, 0, 0, 0.5),
        (TWO, {"bench": things(1), "cat": things(2)}, 1, 0, 0.5),
        (TWO, {}, 0, 0, 0),
        (THREE, {"bench": things(3)}, 1, 1, 1),
        (THREE, {"bench": things(2)}, 0, 0, 2 / 3),
        (THREE, {"bench": things(4)}, 0, 0, 2 / 3),  # excluded
        (THREE, {"bench": things(6)}, 0, 0, 0),
        (THREE, {"bench": things(7)}, 0, 0, -1 / 3),
        (THREE, {}, 0, 0, 0),
        (RED, {"bench": things(1, "red")}, 1, 1, 1),
        (RED, {"bench": things(1, "blue")}, 0, 0, 0.5),  # terms 1, 0
        (RED, {}, 0, 0, 0),  # terms 0, 0
        (RED, {"bench": [*things(1, "red"), *things(1, "blue")]}, 1, 0, 0),  # the best is red; terms 0, 0
        (RED, {"bench": [*things(1, "blue"), *things(1, "red")]}, 0, 0, 0),
        (THREE_RED, {"bench": [*things(2, "red"), *things(1, "pink")]}, 0, 0, 5 / 6),  # terms 1, 1 − 1/3
        (THREE_RED, {"bench": [*things(3, "red"), *things(1)]}, 1, 0, 1 / 3),  # terms 2/3, 0
        (PLACED, {"bench": things(1, box=RIGHT), "dog": things(1)}, 1, 1, 1),
        (PLACED, {"bench": things(1), "dog": things(1, box=RIGHT)}, 0, 0, 2 / 3),  # terms 1, 1, 0
        (PLACED, {"dog": things(1)}, 0, 0, 1 / 3),  # 0; 1, and nothing to stand by: 0
        (PLACED, {"bench": things(1, box=RIGHT)}, 0, 0, 1 / 3),  # 1; 0, 0
        # the best bench stands right; terms 0 (of two benches); 1, and no bench that counts: 0
        (PLACED, {"bench": [Found(RIGHT), Found(LEFT)], "dog": things(1)}, 1, 0, 1 / 3),
        (PLACED, {"bench": [Found(LEFT), Found(RIGHT)], "dog": things(1)}, 0, 0, 1 / 3),
        (RED_BENCH_BLUE_DOG, {"bench": things(1, "red"), "dog": things(1, "blue")}, 1, 1, 1),
        (RED_BENCH_BLUE_DOG, {"bench": things(1, "red"), "dog": things(1, "red")}, 0, 0, 0.75),
        (RED_BENCH_BLUE_DOG, {"bench": things(1, "blue"), "dog": things(1, "red")}, 0, 0, 0.5),
        (RED_BENCH_BLUE_DOG, {"bench": things(1, "red")}, 0, 0, 0.5),  # 1, 1; 0, 0
        (ALL, {"bench": things(1, "red", RIGHT), "dog": things(1, "blue")}, 1, 1, 1),
        (ALL, {"bench": things(1, "red", RIGHT), "dog": things(1, "red")}, 0, 0, 0.75),  # 1, 1; 1, 0, place unasked
        (ALL, {"bench": things(1, "blue", RIGHT), "dog": things(1, "blue")}, 0, 0, 0.6),  # 1, 0; 1, 1, 0
        (ALL, {"bench": things(1, "red", RIGHT), "dog": things(2, "blue")}, 1, 0, 0.5),  # 1, 1; 0, one 0 for both
    ],
)
def test_scores(targets, found, accuracy, strict, credit):
    is_ = verdict(targets, found)
    assert (is_.accuracy, is_.strict) == (accuracy, strict)
    assert math.isclose(is_.credit, credit, abs_tol=1e-12)


def test_the_published_slip_pays_half_for_a_wrong_position_and_nothing_else():
    wrong = verdict(PLACED, {"bench": things(1), "dog": things(1, box=RIGHT)})
    assert wrong.published_credit == 0.75  # terms 1, 1, 0 and then 1
    for found in ({"bench": things(1, box=RIGHT), "dog": things(1)}, {"dog": things(1)}, {"bench": things(1)}):
        is_ = verdict(PLACED, found)
        assert is_.published_credit == is_.credit


def test_every_one_of_several_must_stand_there():
    dogs = {**PLACED, "objects": [{"name": "bench", "count": 2}, {"name": "dog", "count": 2}]}
    benches = [Found(RIGHT), Found(FAR)]
    assert verdict(dogs, {"bench": benches, "dog": things(2)}).accuracy == 1
    one_between = verdict(dogs, {"bench": benches, "dog": [Found(LEFT), Found((60, 0, 70, 10))]})
    assert (one_between.accuracy, one_between.strict) == (0, 0)
    assert math.isclose(one_between.credit, 2 / 3)  # one 0, however many pairs stand wrong
    assert one_between.published_credit == 0.75


def test_the_order_of_the_objects_does_not_matter():
    turned = {"objects": PLACED["objects"][::-1], "relation": ["left of", 0, 1]}
    for found in (
        {"bench": things(1, box=RIGHT), "dog": things(1)},
        {"bench": things(1), "dog": things(1, box=RIGHT)},
        {"dog": things(1)},
    ):
        assert verdict(turned, found) == verdict(PLACED, found)


def test_what_is_excluded_may_be_another_class():
    targets = {**SINGLE, "exclude": [{"name": "dog", "count": 2}]}
    for dogs, accuracy in ((0, 1), (1, 1), (2, 0), (3, 0)):
        is_ = verdict(targets, {"bench": things(1), "dog": things(dogs)})
        assert (is_.accuracy, is_.strict, is_.credit) == (accuracy, 1, 1)  # exclusion is the benchmark's alone


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((20, 0, 30, 10), {"left of"}),
        ((-20, 0, -10, 10), {"right of"}),
        ((0, 20, 10, 30), {"above"}),
        ((0, -20, 10, -10), {"below"}),
        ((20, 20, 30, 30), {"left of", "above"}),  # 20 − 2 of 28.3 along both
        ((20, 60, 30, 70), {"above"}),  # 18 of 63 is not half
        ((5, 0, 15, 10), {"left of"}),  # 5 − 2 of 5
        ((4, 0, 14, 10), set()),  # 4 − 2 of 4 is not more than half
        ((2, 2, 12, 12), set()),  # nothing left of the offset
        ((0, 0, 10, 10), set()),
        ((2.0005, 0, 12.0005, 10), set()),  # less than a thousandth left
    ],
)
def test_relations(other, expected):
    assert relations(LEFT, other, 0.1) == expected


def test_the_margin_is_a_share_of_the_sizes_axis_by_axis():
    assert relations(LEFT, (4, 0, 14, 10), 0.0) == {"left of"}
    assert relations(LEFT, (4, 0, 14, 10), 0.099) == {"left of"}  # 4 − 1.98 of 4
    wide = (12, 0, 52, 10)  # centre 27 to the right, widths 10 and 40
    assert relations(LEFT, wide, 0.26) == {"left of"}  # 27 − 13 of 27
    assert relations(LEFT, wide, 0.28) == set()  # 27 − 14 of 27
    assert relations((52, 0, 12, 10), LEFT, 0.26) == {"right of"}  # sizes are absolute
    assert verdict(PLACED, {"bench": [Found((4, 0, 14, 10))], "dog": things(1)}, margin=0.0).accuracy == 1
    assert verdict(PLACED, {"bench": [Found((4, 0, 14, 10))], "dog": things(1)}).accuracy == 0


def test_targets_may_leave_out_count_and_task():
    wanted = Asked.of({"objects": [{"name": "tv remote"}]})
    assert wanted is not None
    assert [(c.name, c.count, c.colour) for c in wanted.objects] == [("tv remote", 1, None)]
    assert not wanted.counting
    assert Asked.of(THREE).counting


@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"text": "SALE"},
        {"objects": []},
        {"objects": "bench"},
        {"objects": ["bench"]},
        {"objects": [{"name": "circle", "colour": "red"}]},
        {"objects": [{"name": ["bench"]}]},
        {"objects": [{"count": 1}]},
        {"objects": [{"name": "bench", "colour": "teal"}]},
        {"objects": [{"name": "bench", "count": 0}]},
        {"objects": [{"name": "bench", "count": True}]},
        {"objects": [{"name": "bench", "count": 1.0}]},
        {**SINGLE, "exclude": [{"name": "mouse", "count": 1}]},
        {**SINGLE, "exclude": 3},
        {**TWO, "relation": ["near", 0, 1]},
        {**TWO, "relation": ["above", 0, 2]},
        {**TWO, "relation": ["above", -1, 0]},
        {**TWO, "relation": ["above", 1, 1]},
        {**TWO, "relation": ["above", 1]},
        {**TWO, "relation": "above"},
        {**TWO, "relation": [["above"], 0, 1]},
    ],
)
def test_other_targets_ask_for_nothing_it_knows(targets):
    assert Asked.of(targets) is None


def test_metadata_of_the_benchmark_gives_the_same_demands():
    bench, dog = {"class": "bench", "count": 1}, {"class": "dog", "count": 1}
    lines = [
        ({"tag": "single_object", "include": [bench]}, SINGLE),
        ({"tag": "two_object", "include": [bench, {"class": "cat", "count": 1}]}, TWO),
        (
            {
                "tag": "counting",
                "include": [{"class": "bench", "count": 3}],
                "exclude": [{"class": "bench", "count": 4}],
            },
            THREE,
        ),
        ({"tag": "colors", "include": [{**bench, "color": "red"}]}, RED),
        ({"tag": "position", "include": [bench, {**dog, "position": ["left of", 0]}]}, PLACED),
        ({"tag": "color_attr", "include": [{**bench, "color": "red"}, {**dog, "color": "blue"}]}, RED_BENCH_BLUE_DOG),
    ]
    for metadata, targets in lines:
        assert targets_of({**metadata, "prompt": "a photo of a bench"}) == targets
