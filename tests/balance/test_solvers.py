import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import min_norm_weights
from marble.balance.solvers import SOLVERS, solve
from marble.balance.torchjd import TORCHJD, torchjd_weights

EQUAL = torch.ones(4, dtype=torch.float64)


def gradients(seed, count=4, width=9):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_names():
    assert [*SOLVERS] == ["min-norm", "uniform", *TORCHJD]
    with pytest.raises(ValueError, match=r"solver must be one of .*min-norm.*, got 'best'"):
        solve("best", torch.eye(2), torch.ones(2))


@pytest.mark.parametrize("name", SOLVERS)
def test_with_equal_priorities_it_is_what_its_name_says(name):
    g = gradients(0)
    gram = g @ g.T
    expected = {"min-norm": min_norm_weights, "uniform": lambda _: EQUAL / 4}.get(
        name, lambda gram: torchjd_weights(name, gram, 5)
    )(gram)
    for level in (1, 3):  # only their proportions count
        torch.testing.assert_close(solve(name, gram, level * EQUAL, 5), expected, atol=1e-9, rtol=0)


def test_min_norm_progress_is_in_proportion_to_priority():
    # in the balance, every reward's product with the direction is in proportion; the others gain more than that
    wanted = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    checked = 0
    for seed in range(10):
        g = gradients(seed)
        weights = solve("min-norm", g @ g.T, wanted)
        progress = g @ (weights @ g) / wanted
        inside = weights > 1e-9
        torch.testing.assert_close(progress[inside], progress[inside].mean().expand(int(inside.sum())))
        assert (progress >= progress[inside].mean() - 1e-9).all()
        checked += int(inside.sum())
    assert checked > 25


def test_min_norm_with_priorities_by_hand():
    # orthogonal units asked for 2 : 1: of (1/2, 0) and (0, 1) the nearest point has weights 4/5 and 1/5,
    # over priorities 2/5 and 1/5
    assert solve("min-norm", torch.eye(2), torch.tensor([2.0, 1.0])).tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("name", ["uniform", *TORCHJD])
def test_for_the_others_a_priority_multiplies_the_weight(name):
    wanted = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    g = gradients(1)
    weights = solve(name, g @ g.T, EQUAL) * wanted
    torch.testing.assert_close(solve(name, g @ g.T, wanted), weights / weights.sum(), atol=1e-12, rtol=1e-9)


def test_an_order_is_drawn_by_the_seed():
    g = gradients(2, count=6, width=3)  # more conflicts than one: the order matters
    found = [tuple(solve("pcgrad", g @ g.T, torch.ones(6), seed).tolist()) for seed in range(10)]
    assert len(set(found)) > 5
    assert found[3] == tuple(solve("pcgrad", g @ g.T, torch.ones(6), 3).tolist())


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(SOLVERS),
    count=st.integers(1, 7),
    single=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cosines_that_belong_to_no_gradients_do_no_harm(name, count, single, seed):
    """Products of two halves need not be a Gram: any symmetric matrix with ones on the diagonal may come."""
    generator = torch.Generator().manual_seed(seed)
    cosines = (torch.rand(count, count, dtype=torch.float64, generator=generator) * 2.4 - 1.2).clamp(-1, 1)
    cosines = cosines.triu(1) + cosines.triu(1).T + torch.eye(count)
    wanted = torch.rand(count, generator=generator) * 3 + 0.1
    weights = solve(name, cosines.float() if single else cosines, wanted)
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    assert abs(weights.sum().item() - 1) <= 1e-9 * max(1, weights.abs().max().item())
    assert name in ("imtl-g", "aligned-mtl") or (weights >= 0).all()
