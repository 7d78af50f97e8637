import pytest

from marble.scoring import differences


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (10, 20, "x: 10 there, 20 here"),
        (None, {"a": 1}, 'x: none there, {"a": 1} here'),
        ([1, 2], [1], "x: 2 there, 1 here"),
        (["a", "b"], ["a", "ç"], 'x.1: "b" there, "ç" here'),
        ([{"text": "a", "n": 1}], [{"text": "b", "n": 2}], 'x.0.text: "a" there, "b" here'),
        ({"a": 1}, {"a": 1, "b": 2}, "x: a there, a, b here"),
    ],
)
def test_the_first_difference_is_named(old, new, said):
    assert differences({"x": old, "same": 1, "other": 1}, {"x": new, "same": 1, "other": 2}, ["same", "x"]) == [said]
