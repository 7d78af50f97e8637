import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from marble.balance.dual_cone import keep_floors

from .awkward import gradients

KINDS = ["plain", "duplicate", "opposite", "nearly opposite", "zero", "all equal", "summing to zero", "uneven"]

EXACT = ["plain", "duplicate", "opposite", "zero", "all equal", "summing to zero"]
"""The kinds whose directions a Gram determines to more than half of its digits."""


def draw(kind, count, width, seed):
    numbers = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(count, dtype=torch.float64, generator=numbers)
    floors = torch.rand(count, generator=numbers) < 0.7
    return gradients(kind, count, width, seed), weights, floors


def assert_projected(gram, weights, floors, kept, tolerance):
    """Feasible, only lifted on floors, and lifted only where the floor is met exactly: the unique projection."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    lift = kept - weights
    products = gram @ kept
    assert kept.dtype == torch.float64
    assert kept.shape == weights.shape
    assert (lift[~floors] == 0).all()
    assert (lift >= -1e-12 * weights.abs().max()).all()
    length = ((weights.abs() + lift.abs()) * norms).sum()
    assert (products[floors] >= -tolerance * norms[floors] * length).all()
    assert (lift * products).abs().max() <= tolerance * length**2


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 20),
    width=st.integers(1, 40),  # below `count` the Gram is singular
    scale=st.sampled_from([1e-10, 1e-4, 1.0, 1e5, 1e10]),
    single=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_projects_for_awkward_grams(kind, count, width, scale, single, seed):
    g, weights, floors = draw(kind, count, width, seed)
    g = g * scale
    gram = (g.float() @ g.float().T).double() if single else g @ g.T
    assert_projected(gram, weights, floors, keep_floors(gram, weights, floors), 1e-6 if single else 1e-9)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(EXACT), count=st.integers(1, 5), seed=st.integers(0, 1000))
def test_same_direction_as_a_slow_reference(kind, count, seed):
    """SLSQP on the direction itself, in the space of parameters, where nothing is dual and no Gram is formed."""
    g, weights, floors = draw(kind, count, 6, seed)
    direction = (weights @ g).numpy()
    rows = g[floors].numpy()
    found = minimize(
        lambda x: ((x - direction) ** 2).sum(),
        np.zeros(6),
        jac=lambda x: 2 * (x - direction),
        constraints={"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda x: rows} if len(rows) else (),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x
    kept = (keep_floors(g @ g.T, weights, floors) @ g).numpy()
    assert np.square(kept - direction).sum() <= np.square(found - direction).sum() + 1e-6
    if kind == "plain":  # elsewhere SLSQP's own answer is too rough
        assert kept == pytest.approx(found, abs=1e-5)


def test_by_hand():
    # g_0 · d = 4 − 3 = 1, g_1 · d = −3 + 2.5: lifting g_1 by v makes it −0.5 + 2.5 v = 0 and g_0's 1 − 3 v = 0.4
    gram = torch.tensor([[4.0, -3.0], [-3.0, 2.5]])
    both = torch.tensor([True, True])
    assert keep_floors(gram, torch.ones(2), both).tolist() == pytest.approx([1, 1.2], abs=1e-12)
    # an orthogonal pair, against both: nothing of d is left; with one floor, the other part stays
    against = torch.tensor([-1.0, -2.0])
    assert keep_floors(torch.eye(2), against, both).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert keep_floors(torch.eye(2), against, torch.tensor([False, True])).tolist() == pytest.approx([-1, 0], abs=1e-12)


def test_unchanged_where_no_floor_is_broken():
    changed = 0
    for seed in range(60):
        g, weights, floors = draw("plain", 4, 6, seed)
        kept = keep_floors(g @ g.T, weights, floors)
        broken = (g @ (weights @ g))[floors].lt(0).any().item()
        assert torch.equal(kept, weights) != broken
        changed += broken
    assert 5 < changed < 55  # both happen


def test_without_floors_nothing_changes():
    g, weights, _ = draw("plain", 5, 8, 0)
    assert torch.equal(keep_floors(g @ g.T, weights, torch.zeros(5, dtype=torch.bool)), weights)


def test_projecting_twice_changes_nothing_more():
    for seed in range(20):
        g, weights, floors = draw("plain", 6, 9, seed)
        once = keep_floors(g @ g.T, weights, floors)
        assert keep_floors(g @ g.T, once, floors).tolist() == pytest.approx(once.tolist(), abs=1e-9)


def test_many_directions_at_once_and_none_changed_in_place():
    g, _, floors = draw("plain", 6, 9, 3)
    rows = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    kept = keep_floors(g @ g.T, rows, floors)
    assert torch.equal(rows, before)
    assert torch.equal(kept, torch.stack([keep_floors(g @ g.T, row, floors) for row in rows]))


GRAM, WEIGHTS, FLOORS = torch.eye(2), torch.ones(2), torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(2, 3), WEIGHTS, FLOORS), "gram must be"),
        ((torch.zeros(0, 0), WEIGHTS, FLOORS), "gram must be"),
        ((torch.full((2, 2), torch.nan), WEIGHTS, FLOORS), "gram must be"),
        ((GRAM, torch.ones(3), FLOORS), r"weights must be .*K=2.*\(3,\)"),
        ((GRAM, torch.tensor([1.0, torch.inf]), FLOORS), "weights must be"),
        ((GRAM, torch.ones(1, 1, 2), FLOORS), "weights must be"),
        ((GRAM, WEIGHTS, torch.ones(3, dtype=torch.bool)), r"floors must be .*K=2.*\(3,\)"),
        ((GRAM, WEIGHTS, torch.ones(2)), "floors must be .* bool"),
    ],
)
def test_refuses_what_does_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        keep_floors(*arguments)
