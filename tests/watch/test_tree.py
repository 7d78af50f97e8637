import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marble.watch.tree import KEEP, children, leaves, name_of, rebuild, same

LEAVES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=2),
    st.lists(st.floats(-1, 1), max_size=3).map(torch.tensor),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=8,
)


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def copied(tree):
    """The same with tensors and containers of its own."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return type(tree)(map(copied, tree)) if isinstance(tree, (list, tuple)) else tree


def test_names():
    assert name_of(("a",)) == "a"
    assert name_of(("a", "b", 0)) == "a.b[0]"
    assert name_of(("a", 0, "b", 12)) == "a[0].b[12]"
    assert name_of(()) == ""


def test_children_and_leaves_by_hand():
    tree = {"a": [1, (2, None)], "b": {}, "c": "xy"}
    assert list(children(tree["a"])) == [(0, 1), (1, (2, None))]
    assert list(children("xy")) == []  # a text is no container
    assert list(children(torch.zeros(3))) == []
    assert list(leaves(tree)) == [(("a", 0), 1), (("a", 1, 0), 2), (("a", 1, 1), None), (("c",), "xy")]
    assert list(leaves(5)) == [((), 5)]


@given(TREES)
def test_every_leaf_is_where_its_path_says(tree):
    found = list(leaves(tree))
    assert all(at(tree, path) is leaf for path, leaf in found)
    assert len({path for path, _ in found}) == len(found)
    assert not any(isinstance(leaf, (dict, list, tuple)) for _, leaf in found)


@given(TREES)
def test_rebuilding_without_a_change_gives_an_equal_tree_of_the_same_containers(tree):
    again = rebuild(tree, lambda path, node: KEEP)
    assert same(tree, again)
    assert type(again) is type(tree)
    assert [path for path, _ in leaves(again)] == [path for path, _ in leaves(tree)]
    assert all(a is b for (_, a), (_, b) in zip(leaves(again), leaves(tree), strict=True))  # leaves are not copied


@given(TREES, st.data())
def test_rebuilding_puts_another_leaf_in_one_place_and_leaves_the_tree_as_it_was(tree, data):
    before, found = copied(tree), list(leaves(tree))
    if not found:
        return
    chosen, _ = data.draw(st.sampled_from(found))
    again = rebuild(tree, lambda path, node: "new" if path == chosen else KEEP)
    assert at(again, chosen) == "new"
    assert all(at(again, path) is leaf for path, leaf in found if path != chosen)
    assert same(tree, before)


def test_rebuilding_asks_for_a_container_before_what_is_in_it():
    asked = []

    def change(path, node):
        asked.append(path)
        return None if path == ("a",) else KEEP

    assert rebuild({"a": [1, 2], "b": [3]}, change) == {"a": None, "b": [3]}
    assert asked == [(), ("a",), ("b",), ("b", 0)]  # nothing of what is gone
    assert rebuild([1], lambda path, node: 7 if path == () else KEEP) == 7


@given(TREES)
def test_a_copy_is_the_same(tree):
    assert same(tree, copied(tree))
    assert same(copied(tree), tree)


@given(TREES, TREES)
def test_same_is_symmetric_and_means_equal_leaves_in_equal_places(a, b):
    assert same(a, b) == same(b, a)
    if same(a, b):
        one, other = dict(leaves(a)), dict(leaves(b))
        assert one.keys() == other.keys()
        assert all(same(value, other[path]) for path, value in one.items())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.tensor([0.0, 1e-7])),
        (torch.zeros(1), 0.0),
        (torch.zeros(1), None),
        ([1, 2], [1, 2, 3]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
        ([torch.zeros(2)], [torch.ones(2)]),
        ({"a": [1, {"b": torch.zeros(1)}]}, {"a": [1, {"b": torch.ones(1)}]}),
        ([1], {0: 1}),
        (np.zeros(2), np.ones(2)),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan])),
    ],
)
def test_what_is_not_the_same(a, b):
    assert not same(a, b)
    assert not same(b, a)


def test_what_is_the_same():
    assert same((1, 2), [1, 2])  # of either container
    assert same(torch.zeros(2), torch.zeros(2))
    assert same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    cyclic = np.zeros(2)
    assert same([cyclic], [cyclic])  # arrays by identity alone
    assert same(float("inf"), float("inf"))
