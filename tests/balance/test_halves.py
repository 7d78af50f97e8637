"""Products of gradients of two halves of the batch, which the noise of one batch does not bias."""

import itertools
from dataclasses import replace

import pytest
import torch

from marble.balance.method import Method
from marble.gradients import gram_of

from .toy import GROUPS, SIZE, config, made_up, signals_for, table_of, world_of

SIGNALS = made_up(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))


def seen_by(method, rows, signals=SIGNALS):
    """The Gram and the squares that the balancer is given."""
    given = []
    step = method.balancer.step
    method.balancer.step = lambda gram, signal, squares: given.append((gram, squares)) or step(gram, signal, squares)
    method.solve(gram_of(rows), signals)
    return given[0]


def in_halves(first, second, noise):
    """Rows of two rewards with half of their gradient in either half, each half with a noise of its own."""
    first, second, noise = (torch.tensor(each, dtype=torch.float64) for each in (first, second, noise))
    parts = [(each + side) / 2 for side in noise for each in (first, second)]
    return torch.stack([*parts, 0 * first, 0 * first])


def test_noise_that_both_rewards_share_by_hand():
    # a = (2, 0), b = (−1, 1), and a noise of square 8 in either half, the same for both rewards: a whole batch has
    # |a|² + 4 = 8, |b|² + 4 = 6 and a·b + 4 = 2, and sees two rewards that agree; they do not
    rows = in_halves([2.0, 0, 0, 0], [-1.0, 1, 0, 0], [[0, 0, 8**0.5, 0], [0, 0, 0, 8**0.5]])
    halves = Method(config({}, {}, estimate="halves"))
    gram, squares = seen_by(halves, rows)
    torch.testing.assert_close(gram, torch.tensor([[4.0, -2], [-2, 2]], dtype=torch.float64))
    torch.testing.assert_close(squares, torch.tensor([8.0, 6], dtype=torch.float64))
    # two unit vectors weigh the same; norms 2 and √2 folded in: 1/2 : 1/√2 = 1 : √2
    share = 1 / (1 + 2**0.5)
    assert halves.balancer.coefficients.tolist() == pytest.approx([share, 1 - share])
    whole = torch.stack([rows[0] + rows[2], rows[1] + rows[3], rows[4] + rows[5]])
    batch = Method(config({}, {}))
    batch.solve(gram_of(whole), SIGNALS)
    share = 8**-0.5 / (8**-0.5 + 6**-0.5)
    assert batch.balancer.coefficients.tolist() == pytest.approx([share, 1 - share])


def test_a_square_below_0_counts_as_a_twentieth_of_the_noisy_one():
    # the first reward is noise alone, opposite in the halves: a square of −4 · 9 / 4 = −9, whole (0, 0, 0.8), 0.64
    rows = torch.tensor([[1.5, 0, 0.4], [0, 2, 0], [-1.5, 0, 0.4], [0, 2, 0], [0, 0, 0], [0, 0, 0]]).double()
    method = Method(config({}, {}, estimate="halves"))
    gram, squares = seen_by(method, rows)
    torch.testing.assert_close(gram.diagonal(), torch.tensor([4 * (-2.25 + 0.16), 16.0]).double())
    torch.testing.assert_close(squares, torch.tensor([0.64, 16.0]).double())
    assert method.balancer.norms.tolist() == pytest.approx([(0.05 * 0.64) ** 0.5, 4.0])


def test_over_all_splits_the_estimate_is_the_mean_product_of_two_different_prompts():
    """A U-statistic, and so without bias: expectation of `v_p · w_q` over independent prompts p and q."""
    world, signals = world_of(), signals_for(table_of())
    prompts = torch.arange(GROUPS).repeat_interleave(SIZE)
    each = []  # [GROUPS, K, P], every prompt's own whole gradient
    for prompt in range(GROUPS):
        here = (prompts == prompt).double() * GROUPS  # the mean over all images is that over the prompt's
        columns = signals.per_reward.double()
        each.append(torch.stack([world.gradient(here * world.loss.at(columns[:, k])) for k in range(3)]))
    each = torch.stack(each)
    products = torch.einsum("pki,qli->pqkl", each, each)
    pairs = [products[p, q] for p, q in itertools.permutations(range(GROUPS), 2)]
    expected = torch.stack(pairs).mean(dim=0)
    estimates = []
    for chosen in itertools.combinations(range(GROUPS), GROUPS // 2):
        half = torch.isin(prompts, torch.tensor(chosen)).long()
        method = Method(config(estimate="halves"))
        split = replace(signals, half=half)
        estimates.append(seen_by(method, world.rows(method, split), split)[0])
    torch.testing.assert_close(torch.stack(estimates).mean(dim=0), expected, atol=1e-12, rtol=1e-9)
    whole = each.mean(dim=0)
    assert (whole @ whole.T).diagonal().gt(expected.diagonal()).all()  # which the batch's own squares are not


def test_the_direction_is_that_of_the_whole_batch():
    """Halves change what is solved on; with given weights, what is applied is every image's gradient."""
    world, signals = world_of(), signals_for(table_of())
    settings = {"method": "marble", "decay": 0.0}
    method = Method(config(**settings, estimate="halves"))
    direction = world.exact(method, signals)
    torch.testing.assert_close(direction, world.at(method.combined(signals)), atol=1e-7, rtol=1e-5)
    other = Method(config(**settings))
    world.exact(other, signals)
    assert not torch.allclose(method.balancer.norms, other.balancer.norms, rtol=1e-3)


def test_one_half_without_images_still_gives_a_direction():
    world, signals = world_of(), signals_for(table_of())
    one = replace(signals, half=torch.zeros_like(signals.half))
    method = Method(config(estimate="halves"))
    direction = world.exact(method, one)
    assert direction.isfinite().all()
    torch.testing.assert_close(direction, world.at(method.combined(one)), atol=1e-7, rtol=1e-5)
