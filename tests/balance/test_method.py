import pytest
import torch

from marble import min_norm_weights, nft_loss, reference_gradients
from marble.balance.method import Method, signals_of
from marble.config import make_config
from marble.rewards import RewardTable

IMAGES, REWARDS = 12, 3


def config(**balance):
    return make_config(
        {
            "prompts": [{"source": "x"}],
            "rewards": [{"reward": f"r{k}"} for k in range(REWARDS)],
            "balance": {"refresh": 2, **balance},
        }
    )


@pytest.fixture
def table():
    torch.manual_seed(0)
    scores = torch.randn(IMAGES, REWARDS, dtype=torch.float64) * torch.tensor([0.02, 0.3, 1.0])
    scores[:6, 2] = torch.nan  # a specialist that judges half the images
    return RewardTable(["a", "b", "c"], scores, ~scores.isnan())


@pytest.fixture
def signals(table):
    return signals_of(table, torch.arange(4).repeat_interleave(3), torch.tensor([1.0, 2.0, 0.5]), std="group")


@pytest.fixture
def rows(signals):
    """Gradients of a small network off-policy, every reward's and the advantage-free one's."""
    torch.manual_seed(1)
    network = torch.nn.Linear(5, 5)
    x0, x, old = torch.randn(3, IMAGES, 5)
    loss = nft_loss(x0, network(x), old, beta=0.5, amax=5.0)
    columns = torch.cat([signals.per_reward, torch.zeros(IMAGES, 1)], dim=1)
    return loss, list(network.parameters()), reference_gradients(loss, columns, list(network.parameters()))


def test_weighted_sum_is_of_raw_scores_and_skips_missing_ones(table, signals):
    raw = torch.nan_to_num(table.scores) @ torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    first = raw[:3]
    expected = (first - first.mean()) / (first.std(correction=0) + 1e-4)
    torch.testing.assert_close(signals.weighted_sum[:3].double(), expected, atol=1e-6, rtol=1e-5)
    assert signals.signal.all()
    assert (signals.per_reward[:6, 2] == 0).all()


def test_published_refresh_to_the_letter(signals, rows):
    method = Method(config(method="published"))
    own = rows[2][:REWARDS].double()
    direction = method.refresh(rows[2], signals)
    unit = own / own.norm(dim=1, keepdim=True)
    alpha = min_norm_weights(unit @ unit.T)
    expected = (alpha @ unit) * own.norm(dim=1).mean()
    torch.testing.assert_close(direction.vector.double(), expected, atol=1e-6, rtol=1e-5)


def test_published_between_refreshes_is_the_plain_combination(signals, rows):
    method = Method(config(method="published"))
    method.refresh(rows[2], signals)
    expected = signals.per_reward.clamp(-5, 5) @ method.balancer.alpha.float()
    torch.testing.assert_close(method.combined(signals), expected)


@pytest.mark.parametrize("scale", ["match", "published"])
@pytest.mark.parametrize("norms", ["folded", "raw"])
def test_a_refresh_and_an_amortised_update_give_the_same_direction(signals, rows, scale, norms):
    """With either correction, a refresh only saves the second backward: same loss, same gradient."""
    method = Method(config(method="marble", advantage_scale=scale, norms=norms))
    if method.to_the_letter:
        return
    direction = method.refresh(rows[2], signals)
    loss, parameters, _ = rows
    amortised = reference_gradients(loss, method.combined(signals)[:, None], parameters)[0]
    torch.testing.assert_close(direction.vector, amortised, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["marble", "uniform", "weighted-sum"])
def test_matched_advantages_have_unit_spread(signals, rows, name):
    method = Method(config(method=name))
    if method.due():
        method.refresh(rows[2], signals)
    else:
        method.advance()
    combined = method.combined(signals)
    assert combined[combined != 0].square().mean().sqrt() == pytest.approx(1, abs=1e-5)


def test_folding_divides_by_each_gradients_norm(signals, rows):
    method = Method(config(method="marble"))
    method.refresh(rows[2], signals)
    norms = rows[2][:REWARDS].double().norm(dim=1)
    expected = method.balancer.alpha / norms
    torch.testing.assert_close(method.balancer.coefficients, expected / expected.sum(), atol=1e-9, rtol=1e-9)


def test_uniform_without_folding_never_asks_for_gradients():
    assert not Method(config(method="uniform", norms="raw")).due()
    assert Method(config(method="uniform", norms="folded")).due()
    assert not Method(config(method="weighted-sum")).due()


def test_a_reward_without_signal_does_not_enter_the_published_direction(table, rows):
    table.scores[:, 0] = 0.5
    signals = signals_of(table, torch.arange(4).repeat_interleave(3), torch.ones(3), std="group")
    assert signals.signal.tolist() == [False, True, True]
    direction = Method(config(method="published")).refresh(rows[2], signals)
    own = rows[2][1:REWARDS].double()
    unit = own / own.norm(dim=1, keepdim=True)
    expected = (min_norm_weights(unit @ unit.T) @ unit) * own.norm(dim=1).mean()
    torch.testing.assert_close(direction.vector.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_last_updates_are_uniform(signals, rows):
    method = Method(config(method="marble", finish=2, norms="raw", advantage_scale="published"))
    method.balancer.updates = 5
    applied = []
    for _ in range(5):
        if method.due():
            method.refresh(rows[2], signals)
        else:
            method.advance()
        applied.append(method.combined(signals))
    uniform = signals.per_reward.clamp(-5, 5).mean(dim=1)
    assert [torch.allclose(a, uniform, atol=1e-6) for a in applied] == [False, False, False, True, True]


def test_a_missing_score_counts_as_its_groups_mean_in_the_sum():
    scores = torch.tensor([[0.8, 1.0], [0.8, torch.nan], [0.8, 1.0]], dtype=torch.float64)
    table = RewardTable(["a", "b"], scores, ~scores.isnan())
    signals = signals_of(table, torch.zeros(3, dtype=torch.long), torch.ones(2), std="group")
    assert signals.weighted_sum.abs().max() < 1e-6
