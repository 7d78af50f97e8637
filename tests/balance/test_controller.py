"""Progress in standard deviations of the first epochs, and the priorities that follow from it."""

import math

import pytest
import torch

from marble.balance.controller import Controller
from marble.rewards import RewardTable
from marble.storage import load_tree, save_tree


def table(*columns):
    """Scores of K rewards, a column each; None where a reward does not apply."""
    rows = [[torch.nan if score is None else float(score) for score in row] for row in zip(*columns, strict=True)]
    scores = torch.tensor(rows, dtype=torch.float64)
    return RewardTable([f"r{k}" for k in range(len(columns))], scores, ~scores.isnan())


def seen(*tables, rate=1.0, limit=4.0):
    controller = Controller(len(tables[0].names), rate=rate, limit=limit)
    for each in tables:
        controller.observe(each)
    return controller


def test_progress_by_hand():
    controller = Controller(1, rate=1.0, limit=4.0)
    assert controller.progress.tolist() == [0]
    controller.observe(table([0, 2]))  # mean 1, deviation 1
    controller.observe(table([0, 6]))  # mean 3, deviation 3: the start is at 2, the unit is 2
    assert controller.progress.tolist() == [0]
    controller.observe(table([12, 12]))  # 0.8 · 2 + 0.2 · 12 = 4: one unit
    assert controller.progress.tolist() == pytest.approx([1.0])
    controller.observe(table([4, 4]))  # 0.8 · 4 + 0.2 · 4
    assert controller.progress.tolist() == pytest.approx([1.0])
    controller.observe(table([-6, -6]))  # 0.8 · 4 − 0.2 · 6 = 2
    assert controller.progress.tolist() == pytest.approx([0.0])


def test_scales_and_origins_do_not_matter():
    raw = [table([0, 2, 1]), table([1, 3, 1]), table([3, 3, 5]), table([4, 6, 6])]
    scaled = [table(*(100 + 1000 * each.scores).T.tolist()) for each in raw]
    assert seen(*raw).progress.tolist() == pytest.approx(seen(*scaled).progress.tolist())
    assert seen(*raw).progress[0] > 0.5


def test_the_reward_that_lags_is_asked_for_more():
    start = table([0, 2], [0, 2], [0, 2])
    # progress of 0.2 · 3 · (1, 0, −1) standard deviations, mean 0
    controller = seen(start, start, table([4, 4], [1, 1], [-2, -2]), rate=2.0)
    assert controller.progress.tolist() == pytest.approx([0.6, 0.0, -0.6])
    assert controller.priorities.tolist() == pytest.approx([math.exp(-1.2), 1.0, math.exp(1.2)])


def test_equal_progress_changes_nothing():
    start = table([0, 2], [0, 20])
    assert seen(start, start, table([3, 3], [30, 30])).priorities.tolist() == pytest.approx([1.0, 1.0])


def test_priorities_stay_within_the_limit():
    start = table([0, 2], [0, 2])
    controller = seen(start, start, table([1000, 1000], [1, 1]), limit=3.0)
    assert controller.priorities.tolist() == pytest.approx([1 / 3, 3.0])


def test_a_missing_score_does_not_count():
    controller = seen(table([0, 2, None], [5, 5, 5]), table([2, 0, None], [5, 5, 5]), table([None, 6, None], [5, 5, 5]))
    assert controller.progress.tolist() == pytest.approx([0.2 * 5, 0.0])  # constant at first: no unit to measure by


def test_where_it_applies_counts_too():
    plain = table([0, 2], [0, 2])
    masked = RewardTable(plain.names, torch.tensor([[0.0, 0], [2, 99]]), torch.tensor([[True, True], [True, False]]))
    controller = seen(masked, masked)
    assert controller.start.tolist() == [1.0, 0.0]


def test_a_reward_that_is_seen_late_starts_late():
    """Its first epochs are the first in which it judged an image; until then it has made no progress."""
    nothing, some = table([0, 2], [None, None]), table([0, 2], [10, 30])
    controller = seen(nothing, nothing, nothing, some, some)
    assert controller.progress.tolist() == [0, 0]
    assert controller.start.tolist() == [1, 20]
    assert controller.epochs.tolist() == [5, 2]
    controller.observe(table([1, 1], [30, 30]))
    assert controller.progress.tolist() == pytest.approx([0, 0.2])
    controller.observe(nothing)
    assert controller.progress.tolist() == pytest.approx([0, 0.2])  # an epoch without it says nothing of it


def test_goes_on_from_its_state(tmp_path):
    tables = [table([0, 2 + i], [i, None]) for i in range(6)]
    whole, half = seen(*tables), seen(*tables[:3])
    save_tree(tmp_path / "state", half.state_dict())
    other = Controller(2, rate=1.0, limit=4.0)
    other.load_state_dict(load_tree(tmp_path / "state"))
    for each in tables[3:]:
        other.observe(each)
    assert torch.equal(other.priorities, whole.priorities)
    assert torch.equal(other.progress, whole.progress)


def test_a_state_is_not_changed_by_going_on():
    controller = seen(table([0, 2]))
    state = controller.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    for _ in range(3):
        controller.observe(table([5, 9]))
    assert all(torch.equal(state[name], value) for name, value in before.items())
