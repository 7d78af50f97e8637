import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import ppo_loss, reference_gradients

CLIPS = [1e-4, 0.2, 1.0]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def textbook(log_prob, log_prob_old, advantage, clip, amax, kl=None):
    """PPO as its papers write it, image by image before the mean."""
    advantage = advantage.clamp(-amax, amax)
    ratio = torch.exp(log_prob - log_prob_old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss if kl is None else loss + kl


def case(seed, clip, count=8, rewards=3):
    """A network whose log-probabilities lie around the old ones, within and beyond the clip range."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    theta = torch.randn(4, generator=draw, dtype=torch.float64).requires_grad_()
    log_prob = clip * (x @ theta).tanh() * 2
    log_prob_old = clip * torch.randn(count, generator=draw, dtype=torch.float64)
    advantages = 4 * torch.randn(count, rewards, generator=draw, dtype=torch.float64)
    advantages[0] = 0
    return x, theta, log_prob, log_prob_old, advantages


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    clip=st.sampled_from(CLIPS),
    amax=st.sampled_from([0.5, 5.0]),
    penalised=st.booleans(),
)
def test_gradients_are_the_textbooks(seed, clip, amax, penalised):
    x, theta, log_prob, log_prob_old, advantages = case(seed, clip)
    kl = 0.3 * (x @ theta).square() if penalised else None
    loss = ppo_loss(log_prob, log_prob_old, clip=clip, amax=amax, kl=kl)
    rows = reference_gradients(loss, advantages, [theta])
    for k in range(advantages.shape[1]):
        published = textbook(log_prob, log_prob_old, advantages[:, k], clip, amax, kl).mean()
        expected = torch.autograd.grad(published, theta, retain_graph=True)[0]
        torch.testing.assert_close(rows[k], expected, rtol=1e-9, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), clip=st.sampled_from(CLIPS))
def test_value_differs_from_the_textbooks_by_the_clipped_constant_only(seed, clip):
    _, _, log_prob, log_prob_old, advantages = case(seed, clip)
    loss = ppo_loss(log_prob, log_prob_old, clip=clip, amax=5.0)
    advantage = advantages[:, 0].clamp(-5, 5)
    clipped = (loss.effective(advantages)[:, 0] == 0) & (advantage != 0)
    missing = -advantage * (1 + clip * advantage.sign()) * clipped
    published = textbook(log_prob, log_prob_old, advantage, clip, 5.0)
    torch.testing.assert_close(loss.at(advantages[:, 0]) + missing, published)


def test_by_hand():
    # ratios 1.5, 1.1, 0.5 at clip 0.2 and A = 2: −3 is clipped (PPO: −2 · 1.2), −2.2 and −1 are not;
    # at A = −2: 3 and 2.2 stand, 1 is clipped (PPO: 2 · 0.8)
    ratio = doubles(1.5, 1.1, 0.5)
    old = doubles(-1.0, -2.0, 0.0)
    loss = ppo_loss(ratio.log() + old, old, clip=0.2, amax=5.0, kl=doubles(0.1, 0.2, 0.3))
    torch.testing.assert_close(loss.slope, -ratio)
    torch.testing.assert_close(loss.at(doubles(2, 2, 2)), doubles(0 + 0.1, -2.2 + 0.2, -1 + 0.3))
    torch.testing.assert_close(loss.at(doubles(-2, -2, -2)), doubles(3 + 0.1, 2.2 + 0.2, 0 + 0.3))


def test_clipping_is_decided_for_each_image_and_reward():
    # ratios 1.5, 1, 0.5: where the ratio rose, positive entries go; where it fell, negative ones
    loss = ppo_loss(doubles(1.5, 1.0, 0.5).log(), torch.zeros(3, dtype=torch.float64), clip=0.2, amax=5.0)
    advantages = doubles([1, -1, 0, 9], [1, -1, 0, 9], [1, -1, 0, 9])
    assert loss.effective(advantages).tolist() == [[0, -1, 0, 0], [1, -1, 0, 5], [1, 0, 0, 5]]


def test_from_one_on_bad_images_are_never_clipped():
    loss = ppo_loss(doubles(1e-6, 1.9, 2.1).log(), torch.zeros(3, dtype=torch.float64), clip=1.0, amax=5.0)
    assert loss.effective(doubles([1, -1], [1, -1], [1, -1])).tolist() == [[1, -1], [1, -1], [0, -1]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), clip=st.sampled_from(CLIPS))
def test_a_mixture_of_clipped_advantages_is_not_clipped_again(seed, clip):
    """What amortising rests on: left-over entries of an image share a sign, so their mixtures pass unchanged."""
    _, theta, log_prob, log_prob_old, advantages = case(seed, clip)
    loss = ppo_loss(log_prob, log_prob_old, clip=clip, amax=5.0)
    alpha = doubles(0.2, 0.5, 0.3)
    mixed = loss.effective(advantages) @ alpha
    torch.testing.assert_close(loss.effective(mixed[:, None])[:, 0], mixed, rtol=0, atol=0)
    rows = reference_gradients(loss, torch.cat([advantages, mixed[:, None]], dim=1), [theta])
    torch.testing.assert_close(alpha @ rows[:3], rows[3], rtol=1e-9, atol=1e-14)


def test_gradient_makes_good_steps_likelier_and_spares_the_old_policy():
    log_prob = torch.zeros(2, requires_grad=True)
    old = torch.zeros(2, requires_grad=True)
    ppo_loss(log_prob, old, clip=0.2, amax=5.0).at(torch.tensor([2.0, -3.0])).sum().backward()
    assert log_prob.grad.tolist() == [-2.0, 3.0]  # d(−A ratio) at ratio 1
    assert old.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_far_ratio_stays_finite(dtype):
    log_prob = torch.tensor([1e4, 1e4, -1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = ppo_loss(log_prob, torch.zeros(4, dtype=dtype), clip=0.2, amax=5.0)
    values = loss.at(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype))
    values.sum().backward()
    torch.testing.assert_close(values, torch.tensor([0.0, math.exp(20), 0.0, 0.0], dtype=dtype))
    assert log_prob.grad.tolist() == [0, 0, 0, 0]


def test_refuses_bad_input():
    x = torch.zeros(3)
    for values in ({"clip": 0.0, "amax": 5.0}, {"clip": 0.2, "amax": -1.0}, {"clip": math.nan, "amax": 5.0}):
        with pytest.raises(ValueError, match="clip and amax must be > 0, got"):
            ppo_loss(x, x, **values)
    with pytest.raises(ValueError, match=r"one shape \[N\], got \(3,\), \(2,\)"):
        ppo_loss(x, x[:2], clip=0.2, amax=5.0)
    with pytest.raises(ValueError, match=r"one shape \[N\], got \(3,\), \(3,\), \(\)"):
        ppo_loss(x, x, clip=0.2, amax=5.0, kl=x.mean())
    with pytest.raises(ValueError, match=r"one shape \[N\], got \(3, 1\), \(3, 1\)"):
        ppo_loss(x[:, None], x[:, None], clip=0.2, amax=5.0)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"float32 or float64.*{dtype}"):
            ppo_loss(x.to(dtype), x.to(dtype), clip=0.2, amax=5.0)
