import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from marble import min_norm_weights

from .awkward import gradients


def assert_optimal(gram, alpha, tolerance=1e-9):
    """On the simplex, and no vertex pulls further: the certificate of the minimum of a convex quadratic."""
    gram = gram.to(torch.float64)
    gram = (gram + gram.T) / 2
    assert alpha.dtype == torch.float64
    assert (alpha >= 0).all()
    assert abs(alpha.sum().item() - 1) < 1e-12
    pull = gram @ alpha
    assert (alpha @ pull - pull.min()).item() <= tolerance * gram.diagonal().max().item()


KINDS = ["plain", "duplicate", "opposite", "zero", "all equal", "aligned"]


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 20),
    width=st.integers(1, 60),  # below `count` the Gram is singular
    scale=st.sampled_from([1e-10, 1e-4, 1.0, 1e5, 1e10]),
    single=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_optimal_for_awkward_grams(kind, count, width, scale, single, seed):
    g = gradients(kind, count, width, seed) * scale
    gram = (g.float() @ g.float().T) if single else g @ g.T
    assert_optimal(gram, min_norm_weights(gram))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), count=st.integers(2, 7), seed=st.integers(0, 1000))
def test_same_norm_as_a_slow_reference(kind, count, seed):
    """SLSQP from many starts, on the norm itself: the minimiser need not be unique, the minimum is."""
    g = gradients(kind, count, 30, seed)
    gram = (g @ g.T).numpy()
    simplex = {"type": "eq", "fun": lambda a: a.sum() - 1}
    starts = np.random.default_rng(seed).dirichlet(np.ones(count), size=5)
    found = [
        minimize(
            lambda a: a @ gram @ a,
            start,
            jac=lambda a: 2 * gram @ a,
            bounds=[(0, 1)] * count,
            constraints=simplex,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        ).x
        for start in starts
    ]
    found = [a.clip(min=0) / a.clip(min=0).sum() for a in found]  # a sum of 1 − 1e-9 would have an unfair norm
    alpha = min_norm_weights(torch.from_numpy(gram)).numpy()
    assert alpha @ gram @ alpha <= min(a @ gram @ a for a in found) + 1e-9 * gram.diagonal().max()


def test_by_hand():
    # |a (2, 0) + (1 − a) (0, 1)|² = 4 a² + (1 − a)², least at a = 1/5
    g = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert min_norm_weights(g @ g.T).tolist() == pytest.approx([0.2, 0.8], abs=1e-12)
    # (3, 1) and (1, 0): the second alone is nearest, as <(1,0), (3,1) − (1,0)> > 0
    g = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert min_norm_weights(g @ g.T).tolist() == pytest.approx([0, 1], abs=1e-12)


def test_all_zero_is_uniform():
    assert min_norm_weights(torch.zeros(4, 4)).tolist() == [0.25] * 4


def test_direction_never_opposes_a_gradient():
    for seed in range(30):
        g = gradients("plain", 5, 8, seed)
        direction = min_norm_weights(g @ g.T) @ g
        assert (g @ direction).min() > -1e-9


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(3), torch.full((2, 2), torch.nan)])
def test_refuses_what_is_not_a_gram(bad):
    with pytest.raises(ValueError, match="gram must be"):
        min_norm_weights(bad)
