import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import awm_loss, reference_gradients


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(seed, count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    clip=st.sampled_from([0.1, 1.0]),
    pull=st.sampled_from([0.0, 1.0, 5.0]),
    weighted=st.booleans(),
    shape=st.sampled_from([(6, 4), (6, 2, 3, 3)]),
)
def test_gradients_are_ppos_on_the_error(seed, clip, pull, weighted, shape):
    """Against the textbook's `max(−A r, −A clip(r))`, the error as −log p, all written out."""
    x0, x0_old, step = draw(seed, 3, *shape)
    theta = (x0_old + 0.5 * step).requires_grad_()
    weight = draw(seed + 1, 6).exp() if weighted else None
    loss = awm_loss(x0, theta, x0_old, clip=clip, pull=pull, amax=5.0, weight=weight)
    advantages = 4 * draw(seed + 2, 6, 3)
    rows = reference_gradients(loss, advantages, [theta])
    scale = torch.ones(6, dtype=torch.float64) if weight is None else weight
    dims = tuple(range(1, len(shape)))
    log_p, log_p_old = (-scale * (x - x0).pow(2).mean(dims) for x in (theta, x0_old))
    ratio = torch.exp(log_p - log_p_old)
    drift = pull * scale * (theta - x0_old).pow(2).mean(dims)
    for k in range(3):
        a = advantages[:, k].clamp(-5, 5)
        published = (torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)) + drift).mean()
        expected = torch.autograd.grad(published, theta, retain_graph=True)[0].flatten()
        torch.testing.assert_close(rows[k], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("pull", [0.0, 1.0])
def test_at_the_old_policy_it_is_plain_advantage_weighted_matching(pull):
    x0, old = draw(0, 2, 5, 2, 3)
    theta = old.clone().requires_grad_()
    weight, advantages = draw(1, 5).exp(), draw(2, 5, 4)
    rows = reference_gradients(awm_loss(x0, theta, old, pull=pull, weight=weight), advantages, [theta])
    for k in range(4):
        plain = (advantages[:, k] * weight * (theta - x0).pow(2).mean((1, 2))).mean()
        expected = torch.autograd.grad(plain, theta)[0].flatten()
        torch.testing.assert_close(rows[k], expected, rtol=1e-12, atol=1e-14)


def test_by_hand():
    # x0 = 0, theta = 1 and 2, old = 2 and 1, weight 0.5: errors 0.5 and 2, old ones 2 and 0.5,
    # so ratios e^1.5 = 4.48 and e^−1.5 = 0.223; both are 1 from the old policy: const = 3 · 0.5 · 1
    x0, theta, old = doubles([[0], [0]], [[1], [2]], [[2], [1]])
    loss = awm_loss(x0, theta, old, pull=3.0, weight=doubles(0.5, 0.5))
    torch.testing.assert_close(loss.slope, doubles(-math.exp(1.5), -math.exp(-1.5)))
    torch.testing.assert_close(loss.const, doubles(1.5, 1.5))
    # the first is over 1 + clip = 2: a good image there is left to the pull, a bad one is pushed with all its ratio
    assert loss.effective(doubles([1, -1, 7], [1, -1, 7])).tolist() == [[0, -1, 0], [1, -1, 5]]
    torch.testing.assert_close(loss.at(doubles(1, 1)), doubles(1.5, 1.5 - math.exp(-1.5)))
    torch.testing.assert_close(loss.at(doubles(-1, -1)), doubles(1.5 + math.exp(1.5), 1.5 + math.exp(-1.5)))


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_is_bounded_where_the_plain_form_is_not(clip):
    distance = torch.tensor([0.0, 1.0, 10.0, 100.0, 1e4])
    x0, old = torch.zeros(5, 2), torch.ones(5, 2)
    theta = (old + distance[:, None]).requires_grad_()
    loss = awm_loss(x0, theta, old, clip=clip, pull=0.0)
    bad = torch.full((5,), -5.0)
    plain = bad * (theta - x0).square().mean(1)
    assert plain.min() < -1e8
    values = loss.at(bad)
    assert (values >= 0).all()
    assert values.isfinite().all()
    values.sum().backward()
    assert theta.grad.isfinite().all()
    assert theta.grad[3:].abs().max() == 0  # nothing is left to gain from going further
    good = loss.at(-bad)
    assert (good >= -5 * (1 + clip)).all()


def test_good_images_stop_pulling_once_the_ratio_is_over_the_clip_range():
    # x0 = 0, old = 2 (error 4), theta 1.8 (3.24, ratio e^0.76 = 2.14 > 2) and 1.9 (3.61, ratio e^0.39 = 1.48)
    theta = torch.tensor([[1.8], [1.9]], requires_grad=True)
    x0, old = torch.zeros(2, 1), torch.full((2, 1), 2.0)
    awm_loss(x0, theta, old, pull=0.0).at(torch.ones(2)).sum().backward()
    assert theta.grad[0] == 0
    assert theta.grad[1] > 0  # descending moves theta towards x0


def test_pull_holds_the_policy_near_the_old_one():
    x0, old = draw(3, 2, 4, 3)
    theta = (old + 0.1).requires_grad_()
    awm_loss(x0, theta, old, pull=2.0).at(torch.zeros(4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(theta.grad, 2 * 2.0 * 0.1 / 3 * torch.ones(4, 3, dtype=torch.float64))
    assert awm_loss(x0, theta, old, pull=0.0).const.abs().max() == 0


def test_the_old_policy_gets_no_gradient():
    x0, old, theta = draw(4, 3, 4, 3)
    old.requires_grad_()
    theta.requires_grad_()
    awm_loss(x0, theta, old).at(torch.ones(4, dtype=torch.float64)).sum().backward()
    assert old.grad is None
    assert theta.grad is not None


def test_weighting_by_noise_makes_it_the_velocity_error():
    """On a flow `x_t = (1 − s) x0 + s eps`, `v = eps − x0`, `x0_hat = x_t − s v_hat`: the code's own form, in v."""
    x0, eps, v_old, change = draw(5, 4, 6, 3, 4)
    sigma = torch.linspace(0.05, 1.0, 6, dtype=torch.float64)
    s = sigma[:, None, None]
    x_t = (1 - s) * x0 + s * eps
    v_theta = (v_old + 0.3 * change).requires_grad_()
    loss = awm_loss(x0, x_t - s * v_theta, x_t - s * v_old, pull=1.0, weight=sigma**-2)
    log_p, log_p_old = (-(v - (eps - x0)).pow(2).mean((1, 2)) for v in (v_theta, v_old))
    torch.testing.assert_close(loss.slope, -torch.exp(log_p - log_p_old), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.const, (v_theta - v_old).pow(2).mean((1, 2)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_far_old_policy_does_not_overflow(dtype):
    x0 = torch.zeros(2, 3, dtype=dtype)
    theta = x0.clone().requires_grad_()
    values = awm_loss(x0, theta, x0 + 100, pull=0.0).at(torch.tensor([1.0, -1.0], dtype=dtype))
    values.sum().backward()
    torch.testing.assert_close(values, torch.tensor([0.0, math.exp(20)], dtype=dtype))
    assert theta.grad.isfinite().all()


def test_refuses_bad_input():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip and amax must be > 0, got clip=0"):
        awm_loss(x, x, x, clip=0)
    with pytest.raises(ValueError, match=r"clip and amax must be > 0, got clip=1\.0, amax=0"):
        awm_loss(x, x, x, amax=0)
    with pytest.raises(ValueError, match="pull must be >= 0, got -1"):
        awm_loss(x, x, x, pull=-1)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\), \(2, 3\), \(1, 3\)"):
        awm_loss(x, x, x[:1])
    for weight in (torch.ones(3), torch.ones(2, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"weight must be \[N=2\], got"):
            awm_loss(x, x, x, weight=weight)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="weight must be finite and >= 0, got"):
            awm_loss(x, x, x, weight=torch.tensor([1.0, wrong]))
    with pytest.raises(ValueError, match="float32 or float64"):
        awm_loss(x.half(), x.half(), x.half())
