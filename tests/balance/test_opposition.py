"""A pair of rewards is opposed once it has been so, on average, over more than one solve."""

import torch

from marble.balance.opposition import Opposition

ALL = torch.ones(3, dtype=torch.bool)


def gram(cosine, norms=(1.0, 1.0, 1.0)):
    """Of three gradients, of which the first and the last have this cosine."""
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[0, 2] = matrix[2, 0] = cosine
    scale = torch.tensor(norms, dtype=torch.float64)
    return matrix * scale * scale[:, None]


def after(*cosines, **settings):
    watched = Opposition(3)
    for cosine in cosines:
        watched.observe(gram(cosine, **settings), ALL)
    return watched.pairs()


def test_one_batch_says_nothing():
    assert after(-0.99) == []
    assert after(-0.99, -0.99) == [(0, 2)]


def test_the_average_decides_whatever_the_norms():
    # (0.1 · 0.9 · −0.9 + 0.1 · −0.2) / 0.19 = −0.53; with −0.1 for the second, −0.479
    assert after(-0.9, -0.2) == [(0, 2)]
    assert after(-0.9, -0.1) == []
    assert after(-0.9, -0.2, norms=(1e-9, 1.0, 1e3)) == [(0, 2)]


def test_it_ends_when_they_no_longer_oppose_each_other():
    assert after(*[-0.9] * 3) == [(0, 2)]
    assert after(*[-0.9] * 3, *[0.3] * 4) == []


def test_what_cannot_be_seen_does_not_count():
    watched = Opposition(3)
    broken = gram(-0.99)
    broken[0] = broken[:, 0] = torch.nan
    for matrix, signal in (
        (gram(-0.99), ALL),
        (gram(-0.99), torch.tensor([True, True, False])),
        (gram(-0.99, norms=(0.0, 1.0, 1.0)), ALL),
        (broken, ALL),
    ):
        watched.observe(matrix, signal)
        assert watched.pairs() == []
    watched.observe(gram(-0.99), ALL)
    assert watched.pairs() == [(0, 2)]


def test_goes_on_from_its_state():
    one, two = Opposition(3), Opposition(3)
    one.observe(gram(-0.9), ALL)
    two.load_state_dict(one.state_dict())
    for watched in (one, two):
        watched.observe(gram(-0.9), ALL)
    assert one.pairs() == two.pairs() == [(0, 2)]
