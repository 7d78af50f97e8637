import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import AffineLoss, nft_loss


def slow(x0, theta, old, advantage, beta, amax):
    """The published form, image by image: Amax · (r L+ + (1 − r) L−) / beta."""
    out = []
    for n in range(len(x0)):
        r = np.clip(advantage[n], -amax, amax) / (2 * amax) + 0.5
        plus = beta * theta[n] + (1 - beta) * old[n]
        minus = (1 + beta) * old[n] - beta * theta[n]
        parts = []
        for x in (plus, minus):
            weight = max(np.abs(x - x0[n]).mean(), 1e-5)
            parts.append(((x - x0[n]) ** 2 / weight).mean())
        out.append(amax * (r * parts[0] + (1 - r) * parts[1]) / beta)
    return np.array(out)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    amax=st.sampled_from([1.0, 5.0]),
    shape=st.sampled_from([(4,), (2, 3, 3), (1, 2, 2, 2)]),
    equal=st.booleans(),
)
def test_equals_the_published_form(seed, beta, amax, shape, equal):
    rng = np.random.default_rng(seed)
    x0, theta, old = rng.normal(size=(3, 5, *shape))
    if equal:
        theta = old.copy()
        theta[0] = old[0] = x0[0]  # the weight is then its floor
    advantage = rng.normal(size=5) * 4
    loss = nft_loss(*map(torch.from_numpy, (x0, theta, old)), beta=beta, amax=amax)
    got = loss.at(torch.from_numpy(advantage)).numpy()
    np.testing.assert_allclose(got, slow(x0, theta, old, advantage, beta, amax), rtol=1e-9, atol=1e-12)


def test_by_hand():
    # one number: x0 = 0, theta = 2, old = 1, beta = 1: x+ = 2, x− = 0; L+ = 4/2 = 2, L− = 0
    x0, theta, old = torch.tensor([[[0.0]], [[2.0]], [[1.0]]], dtype=torch.float64)
    loss = nft_loss(x0, theta, old, beta=1.0, amax=5.0)
    assert loss.const.item() == pytest.approx(5 * 2 / 2)
    assert loss.slope.item() == pytest.approx(2 / 2)
    assert loss.at(torch.tensor([1.0])).item() == pytest.approx(6.0)


def test_gradient_pulls_towards_a_good_image_and_away_from_a_bad_one():
    x0, old = torch.zeros(2, 1), torch.ones(2, 1)
    theta = torch.ones(2, 1, requires_grad=True)
    nft_loss(x0, theta, old, beta=1.0, amax=5.0).at(torch.tensor([2.0, -2.0])).sum().backward()
    assert theta.grad[0] > 0  # descending moves theta from 1 towards x0 = 0
    assert theta.grad[1] < 0


def test_no_advantage_no_gradient_on_policy():
    x0, old = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    theta = old.clone().requires_grad_()
    nft_loss(x0, theta, old, beta=0.3, amax=5.0).at(torch.zeros(3)).sum().backward()
    assert theta.grad.abs().max() < 1e-12


def test_advantages_are_clipped_before_anything_else():
    loss = nft_loss(*torch.randn(3, 2, 4), beta=1.0, amax=5.0)
    wild = torch.tensor([[7.0, -9.0], [1.0, 0.0]])
    assert loss.effective(wild).tolist() == [[5.0, -5.0], [1.0, 0.0]]
    torch.testing.assert_close(loss.at(torch.tensor([7.0, -9.0])), loss.at(torch.tensor([5.0, -5.0])))


def test_affine_loss_is_what_it_says():
    loss = AffineLoss(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
    assert loss.at(torch.tensor([2.0, 5.0])).tolist() == [7.0, -3.0]


def test_refuses_bad_input():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="> 0"):
        nft_loss(x, x, x, beta=0.0, amax=5.0)
    with pytest.raises(ValueError, match="one shape"):
        nft_loss(x, x, x[:1], beta=1.0, amax=5.0)
