import pytest
import torch

from marble.conflict.across import FOLDS, AcrossBatches, true_cosines


def gathered(batches):
    across = AcrossBatches(len(batches))
    for rows in batches:
        across.add(rows.clone())
    return across


def brute(batches):
    """Mean over all ordered pairs of different batches."""
    pairs = [(a, b) for a in range(len(batches)) for b in range(len(batches)) if a != b]
    return sum(batches[a].double() @ batches[b].double().T for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("count", [3, FOLDS, 11, 2 * FOLDS])
def test_all_pairs_of_different_batches_without_keeping_them(count):
    batches = list(torch.randn(count, 4, 30, generator=torch.Generator().manual_seed(count)))
    across = gathered(batches)
    torch.testing.assert_close(across.gram(), brute(batches), atol=1e-5, rtol=0)
    left = [rows for number, rows in enumerate(batches) if number % across.folds != 1]
    torch.testing.assert_close(across.gram(without=1), brute(left), atol=1e-5, rtol=0)


def test_jackknife_of_three_by_hand():
    # rows 1, 2 and 6: all pairs give (2 + 6 + 12) / 3; without one of them 12, 6 or 2
    estimate = gathered([torch.tensor([[value]]) for value in (1.0, 2.0, 6.0)]).jackknife(lambda gram: gram[0, 0])
    assert estimate.value.item() == pytest.approx(20 / 3)
    parts = torch.tensor([12.0, 6, 2])
    assert estimate.error.item() == pytest.approx((2 / 3 * (parts - parts.mean()).square().sum()).sqrt().item())
    low, high = estimate.interval()
    assert (high - low).item() / 2 == pytest.approx(4.3027 * estimate.error.item(), rel=1e-4)  # Student's t, 2 degrees


PLANTED = torch.tensor([[3.0, 0, 0], [-2, 2, 0], [0, 0, 1]])


def trials(number, batches=10, wide=60, noise=2.0):
    """Batches of planted gradients in noise that is up to 15 times as long, and that rewards share."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.pad(PLANTED, (0, wide - 3))
    for _ in range(number):
        drawn = torch.randn(batches, 3, wide, generator=generator)
        drawn[:, 1] += 0.5 * drawn[:, 0]
        yield [truth + noise * each for each in drawn]


def test_unbiased_where_one_batch_is_not():
    across, naive = [], []
    for batches in trials(400):
        across.append(gathered(batches).gram())
        naive.append(torch.stack([rows.double() @ rows.double().T for rows in batches]).mean(dim=0))
    truth = (PLANTED @ PLANTED.T).double()
    found = torch.stack(across)
    error = found.std(dim=0) / len(found) ** 0.5
    assert ((found.mean(dim=0) - truth).abs() < 4 * error).all()
    off = torch.stack(naive).mean(dim=0) - truth
    assert off[0, 0] == pytest.approx(60 * 4, rel=0.05)  # P times the noise's variance
    assert off[0, 1] == pytest.approx(60 * 4 * 0.5, rel=0.05)
    assert (off[0, 0] > 20 * error[0, 0]).all()


def test_intervals_cover_the_truth():
    truth, inside = (PLANTED @ PLANTED.T).double(), []
    for batches in trials(200):
        low, high = gathered(batches).jackknife(lambda gram: gram).interval()
        inside.append((low <= truth) & (truth <= high))
    share = torch.stack(inside).double().mean(dim=0)
    assert (share > 0.91).all(), share  # 95% asked for; four standard errors of 200 trials are 6%


def test_a_square_that_is_not_above_zero_has_no_cosine():
    gram = torch.tensor([[4.0, 1, 1], [1, 1, 1], [1, 1, -0.1]], dtype=torch.float64)
    found = true_cosines(gram)
    assert found[0, 1] == pytest.approx(0.5)
    assert found[2].isnan().all()
    assert found[:, 2].isnan().all()
