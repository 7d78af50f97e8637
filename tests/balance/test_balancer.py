import pytest
import torch

from marble import Balancer, min_norm_weights
from marble.balance.solvers import SOLVERS, solve
from marble.storage import load_tree, save_tree


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


OPTIONS = [
    {},
    {"decay": 0.0},
    {"fold": True},
    {"smooth": "gram"},
    {"smooth": "gram", "fold": True, "priorities": torch.tensor([1.0, 2.0, 0.5])},
    {"normalise": False},
    {"finish": 2, "updates": 6},
    {"solver": "uniform", "fold": True},
    {"solver": "pcgrad", "seed": 3},  # draws an order at every solve
    {"solver": "nash-mtl", "smooth": "gram"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_goes_on_from_its_state(options, tmp_path):
    one, two = Balancer(3, refresh=2, **options), Balancer(3, refresh=2, **options)
    signal = torch.tensor([True, True, False])
    for u in range(3):
        one.step(gram(u) if one.due() else None, signal if u else None)
    one.priorities = one.priorities * torch.tensor([2.0, 1.0, 1.0])
    save_tree(tmp_path / "state", one.state_dict())
    two.load_state_dict(load_tree(tmp_path / "state"))
    for u in range(3, 6):
        a = one.step(gram(u) if one.due() else None)
        b = two.step(gram(u) if two.due() else None)
        assert torch.equal(a, b)
        assert torch.equal(one.coefficients, two.coefficients)
    assert torch.equal(one.left_out, two.left_out)
    assert torch.equal(one.missing, two.missing)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rewards": 0},
        {"num_rewards": 2, "refresh": 0},
        {"num_rewards": 2, "decay": 1.0},
        {"num_rewards": 2, "finish": 3},
        {"num_rewards": 2, "solver": "best"},
        {"num_rewards": 2, "smooth": "both"},
        {"num_rewards": 2, "priorities": torch.tensor([1.0, 0.0])},
        {"num_rewards": 2, "priorities": torch.ones(3)},
    ],
)
def test_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"need|finish|solver|smooth|priorities"):
        Balancer(**arguments)


def test_refuses_a_missing_or_misshapen_gram():
    with pytest.raises(ValueError, match="needs a Gram"):
        Balancer(2).step()
    with pytest.raises(ValueError, match=r"\[K=2, K\]"):
        Balancer(2).step(gram(0, 3))


# ---- the averaged Gram, squares, priorities, who is left out --------------------------------------------------


def test_averaged_gram_by_hand():
    # decay 0.5: weights of the refreshes 1/4, 1/2 after two, so the mean is (first + 2 second) / 3
    first, second = torch.tensor([[4.0, 0], [0, 1]]), torch.tensor([[1.0, -1], [-1, 4]])
    balancer = Balancer(2, refresh=1, decay=0.5, smooth="gram", normalise=False)
    # min |a (2, 0) + (1 − a) (0, 1)|²: 1 / (4 + 1)
    assert balancer.step(first).tolist() == pytest.approx([0.2, 0.8])
    # mean [[2, −2/3], [−2/3, 3]]: a = (3 + 2/3) / (2 + 3 + 4/3) = 11/19
    assert balancer.step(second).tolist() == pytest.approx([11 / 19, 8 / 19])
    assert balancer.norms.tolist() == pytest.approx([2**0.5, 3**0.5])
    assert torch.equal(balancer.alpha, balancer.solution)  # what is smoothed is not smoothed again


def test_averaged_gram_is_averaged_raw_and_normalised_after():
    balancer = Balancer(3, refresh=1, decay=0.6, smooth="gram")
    mean, mass = torch.zeros(3, 3, dtype=torch.float64), 0.0
    for seed in range(4):
        mean, mass = 0.6 * mean + 0.4 * gram(seed), 0.6 * mass + 0.4
        torch.testing.assert_close(balancer.step(gram(seed)), solved(mean / mass), atol=1e-9, rtol=0)


def test_averaged_gram_of_a_reward_that_is_there_at_times():
    """Each product is averaged over the refreshes in which both had a signal."""
    all_there, two_there = torch.tensor([True, True, True]), torch.tensor([True, True, False])
    balancer = Balancer(3, refresh=1, decay=0.5, smooth="gram")
    balancer.step(gram(0), all_there)
    kept = balancer.alpha[2].clone()
    alpha = balancer.step(gram(1), two_there)
    assert alpha[2] == pytest.approx(kept.item(), abs=1e-12)
    mean = (gram(0) + 2 * gram(1)) / 3
    torch.testing.assert_close(alpha[:2], (1 - kept) * solved(mean[:2, :2]), atol=1e-12, rtol=0)
    alpha = balancer.step(gram(2), all_there)
    mean = (gram(0) + 2 * gram(1) + 4 * gram(2)) / 7
    mean[2] = mean[:, 2] = ((gram(0) + 2 * gram(2)) / 3)[2]  # weights 1/4 and 1/2 of the two it was in
    # its own memory did not fade while it was away
    torch.testing.assert_close(alpha, solved(mean), atol=1e-9, rtol=0)


def test_averaged_gram_forgets_one_that_was_not_finite():
    balancer, clean = (Balancer(2, refresh=1, smooth="gram") for _ in range(2))
    broken = gram(5, 2)
    broken[0] = broken[:, 0] = torch.nan
    for each in (gram(0, 2), broken, gram(1, 2)):
        balancer.step(each)
    for each in (gram(0, 2), gram(1, 2)):
        clean.step(each)
    assert balancer.norms.isfinite().all()
    assert balancer.norms[0] == pytest.approx(clean.norms[0].item())


def test_squares_are_a_floor_for_an_estimate_without_noise():
    # a diagonal of −1 counts as 0.05 · 4 = 0.2, one of 9 stays though 0.05 · 100 = 5 is allowed
    balancer = Balancer(2, fold=True)
    matrix = torch.tensor([[-1.0, 0.1], [0.1, 9.0]])
    assert balancer.step(matrix, squares=torch.tensor([4.0, 100.0])).tolist() == pytest.approx([0.5, 0.5])
    assert balancer.norms.tolist() == pytest.approx([0.2**0.5, 3.0])
    assert not balancer.missing.any()


def test_products_beyond_what_norms_allow_count_as_parallel_or_opposite():
    # cosines clamped to −1: two opposite units weigh the same; unclamped, −0.9 / 0.2 would drive weights apart
    matrix = torch.tensor([[0.01, -0.9, 0.0], [-0.9, 1.0, 0], [0, 0, 1.0]])
    alpha = Balancer(3).step(matrix, squares=torch.tensor([4.0, 1.0, 1.0]))
    assert alpha.tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-9)


def test_squares_hold_for_gradients_that_are_not_normalised():
    # −4 counts as 0.05 · 0.04 = 0.002 and −3 as −√0.002 = −0.0447: a = (1 + 0.0447) / (1 + 0.002 + 0.0894)
    matrix = torch.tensor([[-4.0, -3.0], [-3.0, 1.0]], dtype=torch.float64)
    alpha = Balancer(2, normalise=False).step(matrix, squares=torch.tensor([0.04, 1.0]))
    least = 0.002**0.5
    assert alpha[0] == pytest.approx((1 + least) / (1.002 + 2 * least))


def test_squares_that_are_zero_or_not_finite_leave_a_reward_out():
    balancer = Balancer(3)
    balancer.step(gram(0), squares=torch.tensor([1.0, 0.0, torch.inf]))
    assert balancer.missing.tolist() == [False, True, True]
    assert balancer.norms[0] > 0
    assert balancer.norms[1:].tolist() == [0, 0]


def test_priorities():
    balancer = Balancer(2, refresh=2, priorities=torch.tensor([3.0, 1.0]))
    assert balancer.alpha.tolist() == [0.75, 0.25]  # before anything is known
    assert balancer.step(torch.eye(2)).tolist() == pytest.approx([0.75, 0.25])  # orthogonal units: progress 3 : 1
    balancer.priorities = torch.tensor([1.0, 1.0], dtype=torch.float64)
    balancer.step()
    assert balancer.alpha.tolist() == pytest.approx([0.75, 0.25])  # in force from the next refresh on
    balancer.step(torch.eye(2))
    assert balancer.alpha.tolist() == pytest.approx([0.7 * 0.75 + 0.3 * 0.5, 0.7 * 0.25 + 0.3 * 0.5])


def test_the_finish_is_by_priority():
    balancer = Balancer(2, refresh=1, finish=1, updates=2, priorities=torch.tensor([3.0, 1.0]))
    balancer.step(gram(0, 2))
    assert balancer.alpha.tolist() != pytest.approx([0.75, 0.25])
    assert not balancer.due()
    assert balancer.step().tolist() == [0.75, 0.25]


def test_who_was_left_out_and_how_often():
    balancer = Balancer(3, refresh=2)
    broken = gram(1)
    broken[0] = broken[:, 0] = torch.nan
    balancer.step(broken, torch.tensor([True, True, False]))
    assert balancer.missing.tolist() == [True, False, True]
    balancer.step()
    assert balancer.missing.tolist() == [True, False, True]  # of the last refresh
    balancer.step(gram(2), torch.tensor([True, True, False]))
    assert balancer.missing.tolist() == [False, False, True]
    assert balancer.left_out.tolist() == [1, 0, 2]
    balancer.step()
    balancer.step(gram(2), torch.tensor([False, False, False]))
    assert balancer.left_out.tolist() == [2, 1, 3]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("smooth", ["weights", "gram"])
def test_every_solver_in_a_balancer(name, smooth):
    balancer = Balancer(3, refresh=1, solver=name, smooth=smooth, fold=True)
    for seed in range(3):
        alpha = balancer.step(gram(seed))
        assert alpha.isfinite().all()
        assert alpha.sum() == pytest.approx(1)
        assert balancer.coefficients.sum() == pytest.approx(1)


def test_an_order_is_drawn_anew_at_every_solve():
    g = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norms = g.norm(dim=1)
    for seed in (0, 5):
        balancer = Balancer(6, refresh=1, decay=0.0, solver="pcgrad", seed=seed)
        found = [balancer.step(g @ g.T) for _ in range(6)]
        assert len({tuple(alpha.tolist()) for alpha in found}) > 3
        for update, alpha in enumerate(found):
            expected = solve("pcgrad", g @ g.T / norms[:, None] / norms, torch.ones(6), seed + update)
            torch.testing.assert_close(alpha, expected, atol=1e-9, rtol=0)


def test_folding_without_a_known_norm():
    """A reward never seen takes the mean of the others' norms."""
    balancer = Balancer(3, fold=True, decay=0.0, refresh=1)
    assert torch.equal(balancer.coefficients, balancer.alpha)  # nothing known
    balancer.step(torch.diag(torch.tensor([1.0, 9.0, 4.0])), torch.tensor([True, True, False]))
    expected = balancer.alpha / torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(balancer.coefficients, expected / expected.sum())


def test_a_state_is_not_changed_by_going_on():
    balancer = Balancer(3, refresh=1, smooth="gram", fold=True)
    balancer.step(gram(0), torch.tensor([True, True, False]))
    state = balancer.state_dict()
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    balancer.step(gram(1))
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


def test_a_product_that_is_not_finite_leaves_its_rewards_out_and_spoils_nothing():
    balancer = Balancer(3, refresh=1, smooth="gram", decay=0.5)
    spoilt = gram(1)
    spoilt[0, 2] = spoilt[2, 0] = torch.nan
    balancer.step(spoilt)
    assert balancer.missing.tolist() == [True, False, True]
    assert balancer.step(gram(2)).isfinite().all()


@pytest.mark.parametrize("name", ["has_signal", "squares"])
def test_what_comes_with_a_gram_has_an_entry_a_reward(name):
    with pytest.raises(ValueError, match=rf"{name} must be \[K=3\], got \(1,\)"):
        Balancer(3).step(gram(1), **{name: torch.ones(1, dtype=torch.bool)})


def test_a_state_of_other_rewards_is_refused():
    with pytest.raises(ValueError, match="state must be of 3 rewards, got 5"):
        Balancer(3).load_state_dict(Balancer(5).state_dict())
