"""Fronts, dominance and volumes of points written by hand."""

import numpy as np
import pytest

from marble import MarbleError
from marble.pareto.fronts import Cloud, choose_rewards, describe
from marble.statistics import seed_interval

from .made import made_run, measured, sources_of

NAN = float("nan")
BASE = [[0.0, 0.0], [2.0, 4.0]]  # means 1 and 2, spreads 1 and 2


def flat(a, b):
    """Scores of two prompts around a point's means, spread as the base's are."""
    return [[a - 1, b - 2], [a + 1, b + 2]]


def content_of(*points, **options):
    return describe(measured([BASE, *points], **options), ["a", "b"])


def test_a_known_front_in_base_spreads():
    # gains in spreads: (2, 1), (1, 2), (0.5, 0.5), (-1, 3); over the base's point the first two cover
    # 2·1 + 1·1 = 3 and the last, below the base in a, nothing
    content = content_of(flat(3, 4), flat(2, 6), flat(1.5, 3), flat(0, 8))
    found = content["sets"]["a / b"]
    assert found["fronts"]["all"] == ["p1", "p2", "p4"]
    assert content["points"][3]["fronts"]["a / b"]["dominated_by"] in ("p1", "p2")
    assert content["points"][1]["gains"] == {"a": 2.0, "b": 1.0}
    assert content["points"][4]["means"] == {"a": 0.0, "b": 8.0}
    assert found["kinds"]["all"]["hypervolume"] == pytest.approx(3)
    assert found["kinds"]["all"]["above_reference"] == 3
    assert [found["methods"][f"m{i}"]["hypervolume"] for i in (1, 2, 3, 4)] == pytest.approx([2, 2, 0.25, 0])
    assert content["spreads"] == {"a": 1.0, "b": 2.0}
    assert content["reference"] == "p0"


def test_prompts_are_paired():
    """A gain that is the same on every prompt is certain, however much prompts differ."""
    base = BASE * 3  # fewer than five prompts would have no interval
    content = describe(measured([base, flat(3, 4) * 3, flat(2.9, 3.9) * 3]), ["a", "b"])
    first, second = (content["points"][i]["fronts"]["a / b"] for i in (1, 2))
    assert (first["front"], first["share"]) == (True, 1.0)
    assert second == {"front": False, "share": 0.0, "dominated_by": "p1", "told_apart": True}
    assert content["points"][1]["gain_intervals"]["a"] == pytest.approx([2.0, 2.0])
    low, high = content["points"][1]["intervals"]["a"]
    assert low < 2.5 < high  # the mean alone depends on the prompts


def test_what_is_within_the_noise_is_not_told_apart():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 2))
    better = base + 1
    noise = rng.normal(size=(40, 2))
    noise -= noise.mean(axis=0) + 0.01  # worse by a hundredth on average, by far more or less on each prompt
    content = describe(measured([base, better, better + noise]), ["a", "b"])
    row = content["points"][2]["fronts"]["a / b"]
    assert (row["front"], row["dominated_by"], row["told_apart"]) == (False, "p1", False)
    assert 0.3 < row["share"] < 0.95
    assert content["points"][0]["fronts"]["a / b"]["told_apart"]


def test_gains_are_of_the_images_that_both_have():
    """An image that one side has no score of counts in neither: the base's 8 there is no loss."""
    base, other = [[0.0, 0], [2, 4], [8, 2]], [[1.0, 1], [3, 5], [NAN, 3]]
    content = describe(measured([base, other]), ["a", "b"])
    assert content["points"][1]["means"]["a"] == 2.0  # all the same
    assert content["points"][1]["gains"]["a"] * content["spreads"]["a"] == pytest.approx(1)
    assert content["sets"]["a / b"]["fronts"]["all"] == ["p1"]


def test_told_apart_by_any_that_dominates():
    """The one ahead in most draws is ahead by noise alone; another is surely better, in one reward."""
    rng = np.random.default_rng(0)
    point = rng.normal(size=(40, 2))
    noise = rng.normal(size=40)
    noise -= noise.mean()
    tiny = np.column_stack([noise + 0.3, noise + 0.3])  # two standard errors, in both rewards
    clear = np.column_stack([np.full(40, 3.0), noise + 0.001])  # even odds in the second reward
    row = describe(measured([point - 1, point, point + tiny, point + clear]), ["a", "b"])["points"][1]["fronts"][
        "a / b"
    ]
    assert (row["dominated_by"], row["told_apart"]) == ("p3", True)


def test_many_that_dominate_by_noise_are_allowed_for():
    rng = np.random.default_rng(1)
    point = rng.normal(size=(30, 2))
    others = []
    for _ in range(40):  # each ahead by one and a half standard errors, as the best of many by chance
        noise = rng.normal(size=(30, 2))
        noise -= noise.mean(axis=0)
        others.append(point + noise + 2.2 * noise.std(axis=0, ddof=1) / 30**0.5)
    row = describe(measured([point - 1, point, *others]), ["a", "b"])["points"][1]["fronts"]["a / b"]
    assert (row["front"], row["told_apart"]) == (False, False)


def test_a_handful_of_prompts_tells_nothing_apart():
    content = content_of(flat(3, 4), flat(2.9, 3.9))
    assert content["points"][2]["fronts"]["a / b"]["told_apart"] is False
    assert content["points"][1]["gain_intervals"] == content["points"][1]["intervals"] == {"a": None, "b": None}


def test_three_rewards_and_every_pair():
    base = np.array([[0.0, 0, 0], [2, 2, 2]])
    ups = [np.array(up) + base for up in ([1.0, 1, 0.5], [0.5, 0.5, 2], [0.4, 0.4, 1.5])]
    content = describe(measured([base, *ups], names=("a", "b", "c")), ["a", "b", "c"])
    assert list(content["sets"]) == ["a / b / c", "a / b", "a / c", "b / c"]
    assert content["sets"]["a / b / c"]["fronts"]["all"] == ["p1", "p2"]
    assert content["sets"]["a / b"]["fronts"]["all"] == ["p1"]
    # boxes 1 × 1 × 0.5 and 0.5 × 0.5 × 2 share 0.5 × 0.5 × 0.5
    assert content["sets"]["a / b / c"]["kinds"]["all"]["hypervolume"] == pytest.approx(0.5 + 0.5 - 0.125)


def test_a_reward_that_gave_no_score_leaves_a_point_out():
    content = content_of(flat(3, 4), [[5.0, NAN], [5.0, NAN]])
    assert content["points"][2]["fronts"]["a / b"] is None
    assert content["points"][2]["means"] == {"a": 5.0, "b": None}
    assert content["sets"]["a / b"]["fronts"]["all"] == ["p1"]
    assert content["sets"]["a / b"]["kinds"]["all"]["hypervolume"] == pytest.approx(2)


def test_a_reward_that_judges_some_prompts_counts_on_those():
    base, other = [[0.0, NAN], [2.0, 4.0], [1.0, 2.0]], [[1.0, NAN], [3.0, 6.0], [2.0, 4.0]]
    content = describe(measured([base, other]), ["a", "b"])
    assert content["points"][0]["means"] == {"a": 1.0, "b": 3.0}
    assert content["points"][1]["means"] == {"a": 2.0, "b": 5.0}


def test_over_seeds_the_mean_volume_and_its_interval(tmp_path):
    runs = sources_of(*(made_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)))
    scores = [BASE, flat(3, 4), flat(2, 6)]
    points = measured(scores, methods=["", "arm", "arm"], sources=[(), (runs[0],), (runs[1],)])
    row = describe(points, ["a", "b"])["sets"]["a / b"]["methods"]["arm"]
    assert row["seeds"] == pytest.approx({"0": 2, "1": 2})  # each alone, not both together, which cover 3
    assert row["hypervolume"] == pytest.approx(2)
    assert row["interval"] == pytest.approx(list(seed_interval(np.array([2.0, 2.0]))))


def test_a_soup_counts_with_what_it_is_mixed_of(tmp_path):
    runs = sources_of(made_run(tmp_path / "one"), made_run(tmp_path / "two", ["mini-text"]))
    kinds, methods = ["base", "method", "method", "soup"], ["", "one", "two", "soup of one and two"]
    scores = [BASE, flat(3, 2.5), flat(1.5, 6), flat(2.2, 5)]
    points = measured(scores, kinds=kinds, methods=methods, sources=[(), (runs[0],), (runs[1],), tuple(runs)])
    cloud = Cloud.of(points)
    assert cloud.chosen("soup of one and two") == [1, 2, 3]
    assert cloud.chosen("one") == [1]
    assert cloud.chosen(kind="soup") == [3]


def test_the_matrix_is_of_what_was_trained_on(tmp_path):
    runs = sources_of(made_run(tmp_path / "one"), made_run(tmp_path / "two", ["mini-text"]))
    names = ("aesthetic", "alignment", "text")
    base = np.array([[0.0, 0, 0], [2, 2, 2]])
    points = measured(
        [base, base + np.array([1, 0, 1]), base + np.array([2, 0, 0.25])], names, sources=[(), (runs[0],), (runs[1],)]
    )
    matrix = describe(points, ["aesthetic", "alignment"])["hypervolumes"]
    assert matrix["rewards"] == ["aesthetic", "text"]
    assert matrix["values"][0][1] == matrix["values"][1][0] == pytest.approx(1 + 0.25)
    assert matrix["values"][0][0] is None


@pytest.mark.parametrize(
    ("names", "asked", "found"),
    [
        (["x", "aesthetic", "alignment"], [], ["aesthetic", "alignment"]),
        (["x", "y", "alignment"], [], ["x", "y"]),
        (["x", "y", "z"], ["z", "x"], ["z", "x"]),
    ],
)
def test_which_rewards(names, asked, found):
    assert choose_rewards(names, asked) == found


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["aesthetic", "text"], ["aestetic", "text"], 'Did you mean "aesthetic"'),
        (["a", "b"], ["a"], "two or three"),
        (["a", "b"], ["a", "a"], "two or three"),
        (["a"], [], "needs two rewards"),
    ],
)
def test_rewards_that_will_not_do(names, asked, message):
    with pytest.raises(MarbleError, match=message):
        choose_rewards(names, asked)
