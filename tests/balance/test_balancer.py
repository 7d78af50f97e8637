import pytest
import torch

from marble import Balancer, min_norm_weights


def gram(seed, count=3):
    g = torch.randn(count, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return g @ g.T


def solved(matrix):
    norms = matrix.diagonal().sqrt()
    return min_norm_weights(matrix / (norms[:, None] * norms))


def test_schedule_and_smoothing():
    balancer = Balancer(3, refresh=3, decay=0.7)
    asked, given = [], {}
    for update in range(7):
        asked.append(balancer.due())
        given[update] = gram(update)
        alpha = balancer.step(given[update] if asked[-1] else None)
    assert asked == [True, False, False, True, False, False, True]
    expected = solved(given[0])  # the first solution starts the average
    for update in (3, 6):
        expected = 0.7 * expected + 0.3 * solved(given[update])
    torch.testing.assert_close(alpha, expected, atol=1e-12, rtol=0)


def test_scale_of_a_gradient_does_not_matter():
    scale = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    plain, scaled = Balancer(3), Balancer(3)
    matrix = gram(1)
    torch.testing.assert_close(plain.step(matrix), scaled.step(matrix * scale[:, None] * scale), atol=1e-9, rtol=0)


def test_reward_without_signal_keeps_its_weight_and_is_not_solved_for():
    balancer = Balancer(3, refresh=1, decay=0.0)
    first = balancer.step(gram(1))
    second = balancer.step(gram(2), torch.tensor([True, True, False]))
    assert second[2] == pytest.approx(first[2].item(), abs=1e-12)
    pair = solved(gram(2)[:2, :2])
    torch.testing.assert_close(second[:2], pair * (1 - first[2]), atol=1e-12, rtol=0)


def test_zero_and_not_finite_gradients_are_left_out():
    matrix = gram(3)
    matrix[0] = matrix[:, 0] = 0
    matrix[1] = matrix[:, 1] = torch.nan
    alpha = Balancer(3).step(matrix)
    assert alpha.isfinite().all()
    assert alpha.sum() == pytest.approx(1)
    assert alpha.min() > 0  # left out of the solve is not weight 0


def test_no_reward_with_signal_changes_nothing():
    balancer = Balancer(2, refresh=1)
    before = balancer.step(gram(1, 2))
    assert torch.equal(balancer.step(gram(2, 2), torch.tensor([False, False])), before)


def test_finish_is_uniform():
    balancer = Balancer(3, refresh=1, finish=2, updates=4)
    alphas = [balancer.step(gram(u) if balancer.due() else None) for u in range(4)]
    assert not torch.allclose(alphas[1], torch.full((3,), 1 / 3, dtype=torch.float64))
    for alpha in alphas[2:]:
        torch.testing.assert_close(alpha, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_folded_coefficients_make_the_raw_combination_point_as_the_normalised_one():
    g = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g *= torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]
    balancer = Balancer(3, fold=True)
    alpha = balancer.step(g @ g.T)
    wanted = (alpha / g.norm(dim=1)) @ g
    applied = balancer.coefficients @ g
    assert torch.cosine_similarity(wanted, applied, dim=0) == pytest.approx(1, abs=1e-12)
    assert balancer.coefficients.sum() == pytest.approx(1)


def test_uniform_solver():
    balancer = Balancer(4, solver="uniform")
    assert not balancer.due()
    assert balancer.step().tolist() == [0.25] * 4


def test_goes_on_from_its_state():
    one, two = Balancer(3, refresh=2, fold=True), Balancer(3, refresh=2, fold=True)
    for u in range(3):
        one.step(gram(u) if one.due() else None)
    two.load_state_dict(one.state_dict())
    for u in range(3, 6):
        a = one.step(gram(u) if one.due() else None)
        b = two.step(gram(u) if two.due() else None)
        assert torch.equal(a, b)
    assert torch.equal(one.coefficients, two.coefficients)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rewards": 0},
        {"num_rewards": 2, "refresh": 0},
        {"num_rewards": 2, "decay": 1.0},
        {"num_rewards": 2, "finish": 3},
        {"num_rewards": 2, "solver": "best"},
    ],
)
def test_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"need|finish|solver"):
        Balancer(**arguments)


def test_refuses_a_missing_or_misshapen_gram():
    with pytest.raises(ValueError, match="needs a Gram"):
        Balancer(2).step()
    with pytest.raises(ValueError, match=r"\[K=2, K\]"):
        Balancer(2).step(gram(0, 3))
