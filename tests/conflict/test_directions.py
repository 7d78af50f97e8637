import json

import pytest
import torch

from marble.conflict.across import AcrossBatches
from marble.conflict.directions import DIRECTIONS, describe_gradients
from marble.gradients import gram_of

NAMES = ["a", "b", "c"]


def described(truth, *, noise=0.0, batches=16, updates=3, wide=80, common=None, signal=(True, True, True), seed=0):
    """Updates of planted gradients; the weighted sum is 10 a + b + c, noise included."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.pad(torch.tensor(truth, dtype=torch.float32), (0, wide - len(truth[0])))
    pull = torch.zeros(1, wide) if common is None else torch.nn.functional.pad(torch.tensor([common]), (0, wide - 3))
    across, grams = AcrossBatches(batches), []
    for _ in range(batches):
        made = []
        for _ in range(updates):
            own = truth + noise * torch.randn(truth.shape, generator=generator)
            own[~torch.tensor(signal)] = 0
            made.append(torch.cat([own, torch.tensor([[10.0, 1, 1]]) @ own, pull]))
        across.add(torch.stack(made).mean(dim=0))
        grams.append([gram_of(rows) for rows in made])
    found = describe_gradients(NAMES, grams, [torch.tensor(signal)] * batches, across)
    json.dumps(found, allow_nan=False)
    return found


def test_without_noise_by_hand():
    # a = (2, 0, 0), b = (−0.6, 0.8, 0), c = (0, 0, 1); the sum is (19.4, 0.8, 1), of length sqrt(378)
    found = described([[2.0, 0, 0], [-0.6, 0.8, 0], [0, 0, 1]], updates=2)
    assert found["cosines_true"]["estimate"][0] == pytest.approx([1, -0.6, 0], abs=1e-6)
    assert found["cosines_one_batch"]["mean"][0] == pytest.approx([1, -0.6, 0], abs=1e-6)
    assert found["norms"]["a"]["true"] == pytest.approx(2)
    assert found["norms"]["a"]["shown"] == pytest.approx(1)
    assert found["norms"]["a"]["batches_needed"] == pytest.approx(0, abs=1e-6)
    assert found["pull"] == 0
    raw = found["directions"]["weighted_sum"]
    assert raw["advantage"] == raw["whole"]
    worst = (-0.6 * 19.4 + 0.8 * 0.8) / 378**0.5
    assert raw["advantage"]["worst"] == pytest.approx(worst, rel=1e-6)
    assert raw["kept"] == pytest.approx(worst, rel=1e-6)
    assert raw["true"]["worst"] == pytest.approx(worst, rel=1e-6)
    assert raw["true"]["worst_reward"] == "b"
    assert raw["advantage"]["conflict_rate"] == 1
    assert raw["advantage"]["against"] == {"a": 0, "b": 1, "c": 0}
    assert raw["advantage"]["conflict_rate_low"] == pytest.approx(16 / (16 + 1.96**2), rel=1e-3)  # Wilson's, of 16
    # unit gradients (1, 0, 0), (−0.6, 0.8, 0), (0, 0, 1): their sum (0.4, 0.8, 1), worst for a
    assert found["directions"]["uniform"]["advantage"]["worst"] == pytest.approx(0.4 / 1.8**0.5)
    # standardised: (1.4, 0.8, 1), worst for b
    assert found["directions"]["standardised_sum"]["advantage"]["worst"] == pytest.approx(-0.2 / 3.6**0.5, rel=1e-5)
    # balanced: unit gradients of which none is further off than another, so equal products with all three
    cosines = found["directions"]["fresh"]["true"]["cosines"]
    assert len({round(value, 6) for value in cosines.values()}) == 1
    assert found["directions"]["fresh"]["advantage"]["conflict_rate"] == 0
    assert set(found["directions"]) == set(DIRECTIONS)


def test_planted_cosines_are_found_under_noise():
    """Noise 9 times as long as a gradient hides the conflict from single updates, not from all together."""
    truth = [[1.0, 0, 0], [-0.8, 0.6, 0], [0.6, 0, 0.8]]
    found = described(truth, noise=1.0, batches=64, updates=6)
    cosines = found["cosines_true"]
    assert abs(found["cosines_one_batch"]["mean"][0][1]) < 0.05
    for i, j, planted in ((0, 1, -0.8), (0, 2, 0.6), (1, 2, -0.48)):
        assert cosines["low"][i][j] <= planted <= cosines["high"][i][j]
        assert cosines["high"][i][j] - cosines["low"][i][j] < 0.8
    assert cosines["conflict"][0][1]
    assert cosines["conflict"][1][0]
    assert not cosines["agree"][0][1]
    assert cosines["agree"][0][2]
    norm = found["norms"]["a"]
    assert norm["known"]
    assert norm["one_batch"] == pytest.approx(81**0.5, rel=0.03)  # 1 and 80 dimensions of noise
    assert norm["true_low"] <= 1 <= norm["true_high"]
    assert norm["shown"] == pytest.approx(1 / 9, rel=0.25)
    assert norm["batches_needed"] == pytest.approx(80, rel=0.5)


def test_noise_alone_is_not_taken_for_gradients():
    sure = 0
    for seed in range(20):
        found = described([[0.0] * 3] * 3, noise=1.0, batches=8, updates=1, seed=seed)
        sure += sum(row["known"] for row in found["norms"].values())
        assert not any(flag for row in found["cosines_true"]["conflict"] for flag in row)
    assert sure <= 6  # of 60, at 2.5%
    unknown = next(name for name, row in found["norms"].items() if not row["known"])
    row = found["cosines_true"]["estimate"][NAMES.index(unknown)]
    assert row == [None, None, None]
    assert found["norms"][unknown]["shown"] is None


def test_the_balanced_direction_is_judged_on_what_it_was_not_solved_on():
    found = described([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], noise=0.7, batches=24, updates=2)["directions"]["fresh"]
    assert found["advantage"]["worst"] > found["kept"] + 0.01  # part of what it shows fits its own noise
    assert found["true"]["worst"] == pytest.approx(1 / 3**0.5, abs=0.1)


def test_a_direction_that_may_be_nothing_keeps_no_cosine():
    """Twins that oppose each other and a third of noise: what is left of their sum is not surely longer than 0."""
    evens = []
    for seed in range(8):
        truth = [[1.0, 0, 0], [-1, 0, 0], [0, 0, 0]]
        found = described(truth, noise=0.3, batches=12, updates=2, seed=seed)["directions"]
        evens.append(found["standardised_sum"])
        assert all(row["kept"] is None or -1 <= row["kept"] <= 1 for row in found.values())
        assert found["weighted_sum"]["kept"] == pytest.approx(-1, abs=0.15)  # 10 a + b is long
    assert sum(even["kept"] is None for even in evens) >= 7  # surely above 0 by chance at 2.5%
    assert sum(even["true"] is None for even in evens) >= 7


def test_whom_the_sum_surely_works_against():
    """10 a + b + c: b, at −0.6 to a, is surely opposed; c, orthogonal to both, only by noise."""
    found = described([[1.0, 0, 0], [-0.6, 0.8, 0], [0, 0, 1]], noise=0.3, batches=24, updates=2)
    raw = found["directions"]["weighted_sum"]
    assert raw["true"]["against"] == ["b"]
    alike = described([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], noise=0.3, batches=24, updates=2)
    assert alike["directions"]["weighted_sum"]["advantage"]["conflict_rate"] > 0.1
    assert alike["directions"]["weighted_sum"]["true"]["against"] == []


def test_batches_without_a_signal_count_on_both_sides():
    """One in two batches shows a reward, always the same: half its gradient is the truth, and needs one more update."""
    across, grams, signal = AcrossBatches(16), [], []
    for number in range(16):
        speaks = number // 8 == 1  # the second batch of every fold
        own = torch.tensor([[2.0, 0, 0], [0, 3 * speaks, 0]])
        rows = torch.cat([own, own.sum(dim=0, keepdim=True), torch.zeros(1, 3)])
        grams.append([gram_of(rows)])
        signal.append(torch.tensor([True, speaks]))
        across.add(rows)
    norm = describe_gradients(["a", "b"], grams, signal, across)["norms"]["b"]
    # pairs of different batches that both speak: 8 · 7 of 16 · 15, of square 9
    true = (9 * 56 / 240) ** 0.5
    assert norm["true"] == pytest.approx(true)
    assert norm["one_batch"] == pytest.approx(1.5)
    assert norm["known"]
    assert norm["shown"] == pytest.approx(true / 1.5)
    assert norm["batches_needed"] == pytest.approx((4.5 - true**2) / true**2)


def test_a_pull_hides_conflict_from_whole_gradients():
    found = described([[1.0, 0, 0], [-1, 0.1, 0], [0, 0, 1]], common=[0.0, 0, 50], updates=1)
    raw = found["directions"]["weighted_sum"]
    assert raw["advantage"]["conflict_rate"] == 1
    assert raw["whole"]["conflict_rate"] == 0
    assert found["pull"] == pytest.approx(50 / ((1 + 1.01**0.5 + 1) / 3))


def test_a_reward_without_signal_is_left_out():
    found = described([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], signal=(True, False, True))
    assert found["norms"]["b"]["one_batch"] is None
    assert not found["norms"]["b"]["known"]
    assert found["cosines_one_batch"]["mean"][0][1] is None
    assert found["cosines_true"]["estimate"][1] == [None] * 3
    assert "b" not in found["directions"]["uniform"]["advantage"]["against"]
    assert found["directions"]["uniform"]["advantage"]["worst"] == pytest.approx(0.5**0.5)
    nothing = described([[1.0, 0, 0]] * 3, signal=(False, False, False))
    assert nothing["directions"]["weighted_sum"] == {"advantage": None, "whole": None, "kept": None, "true": None}
