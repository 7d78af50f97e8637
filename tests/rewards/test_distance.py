import pytest
import torch

from marble.rewards.closed_form import Distance


def flat(*levels):
    return torch.stack([torch.full((3, 64, 64), level, dtype=torch.uint8) for level in levels])


def test_distance_by_hand():
    # |0 − 255| / 255 = 1 and |0 − 51| / 255 = 0.2 from black; 0.8 between the others
    scores = Distance().score(flat(0, 255, 51), [])
    assert scores.tolist() == pytest.approx([0.6, 0.9, 0.5])


def test_one_picture_and_equal_ones_have_none():
    assert Distance().score(flat(9), []).tolist() == [0.0]
    assert Distance().score(flat(9, 9, 9), []).tolist() == [0.0, 0.0, 0.0]


def test_grain_counts_for_less_than_layout():
    noise = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    halves = flat(0, 0)
    halves[0, :, :32], halves[1, :, :, :32] = 255, 255
    assert Distance().score(noise, [])[0] < 0.05 < 0.6 < Distance().score(halves, [])[0]
