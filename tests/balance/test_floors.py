"""Rewards that no direction may oppose."""

import pytest
import torch

from marble.balance.method import Method
from marble.catalogue import FROM_GRADIENTS

from .toy import config, made_up, signals_for, table_of, vectors, world_of

SIGNALS = made_up(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
FLOOR = ({}, {"floor": True})


def both(own, const, **settings):
    """Directions without and with the floor on the second reward, and the method that has it."""
    free, held = Method(config({}, {}, **settings)), Method(config(*FLOOR, **settings))
    return vectors(free, own, const, SIGNALS), vectors(held, own, const, SIGNALS), held


def test_where_a_common_pull_hides_the_conflict():
    # whole gradients (3, 0, 5) and (−1, 0.1, 5) agree, the own parts (3, 0, 0) and (−1, 0.1, 0) do not: the first
    # is longer and wins
    own, const = [[3.0, 0, 0], [-1.0, 0.1, 0]], [0.0, 0, 5]
    free, held, method = both(own, const, advantage_scale="published")
    second, pull = torch.tensor(own[1]).double(), torch.tensor(const).double()
    assert free @ second < -0.1
    assert free @ (second + pull) > 0
    assert held @ second == pytest.approx(0, abs=1e-9)
    assert held @ (second + pull) > 0
    # the nearest such direction: what opposes the second is taken out, along it
    expected = free - (free @ second) / (second @ second) * second
    torch.testing.assert_close(held, expected, atol=1e-8, rtol=0)
    assert method.lift[0] == 0
    assert method.lift[1] > 0


def test_where_the_common_pull_opposes_the_reward():
    own, const = [[0.0, 1.0], [1.0, 0.0]], [-5.0, 0.0]
    free, held, _ = both(own, const, advantage_scale="published")
    assert free[0] < -1
    assert held[0] == pytest.approx(0, abs=1e-9)


def test_where_smoothed_weights_are_out_of_date():
    # the second is ten times the first's length, and mgda gives it 1 / 101; then it turns round
    free, held = (Method(config({}, *term, method="mgda", refresh=1, decay=0.9)) for term in ([{}], [{"floor": True}]))
    second = torch.tensor([-1.0, 0.1]).double()
    found = []
    for method in (free, held):
        vectors(method, [[1.0, 0], [0, 10.0]], [0.0, 0], SIGNALS)
        assert (method.lift == 0).all()
        found.append(vectors(method, [[1.0, 0], [-1.0, 0.1]], [0.0, 0], SIGNALS))
    assert found[0] @ second < -0.1
    assert found[1] @ second == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("scale", ["match", "published"])
@pytest.mark.parametrize("name", [name for name in FROM_GRADIENTS if name != "published"])
def test_no_floor_is_ever_broken_by_a_solve(name, scale):
    """Three rewards, two of them floors, in as many dimensions as leave room for conflict."""
    broken = 0
    for seed in range(25):
        g = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        signals = made_up(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
        terms = ({"floor": True}, {}, {"floor": True})
        directions = [
            vectors(Method(config(*each, method=name, advantage_scale=scale)), g[:3].tolist(), g[3].tolist(), signals)
            for each in (terms, ({}, {}, {}))
        ]
        floors = torch.cat([g[:3], g[:3] + g[3]])[[0, 2, 3, 5]]
        least = [(floors @ d / floors.norm(dim=1) / d.norm()).min().item() for d in directions]
        assert least[0] > -1e-7
        broken += least[1] < -1e-3
        if least[1] > 1e-6:
            torch.testing.assert_close(*directions, atol=1e-12, rtol=0)
    assert broken > 3


@pytest.mark.parametrize("scale", ["published", "match"])
def test_amortised_updates_keep_to_the_direction_with_floors(scale):
    lifted = 0
    for seed in range(6):
        world, signals = world_of(seed), signals_for(table_of(seed))
        method = Method(config({"floor": True}, {"floor": True}, {}, advantage_scale=scale))
        direction = world.exact(method, signals)
        combined = method.combined(signals)
        assert combined.abs().max() < 5
        assert torch.cosine_similarity(direction, world.at(combined), dim=0) == pytest.approx(1, abs=1e-9)
        lifted += bool((method.lift > 1e-3).any())
    assert lifted >= 2


@pytest.mark.parametrize("scale", ["published", "match"])
def test_where_only_the_whole_gradient_is_opposed(scale):
    """It lifts the common part too, beyond its weight of 1; amortised updates keep that at 1 and scale the rest."""
    # half of either own part and the pull are (2, 0.3), which (0, 1) agrees with and (−1, 0.8) does not: −1.76
    rows = torch.tensor([[6.0, 0], [0, 1], [-1, -0.2]], dtype=torch.float64)
    method = Method(config(*FLOOR, gradients="advantage", norms="raw", advantage_scale=scale))
    mixture = method.solve(rows @ rows.T, SIGNALS)
    assert mixture[2] > 1.5
    if scale == "published":
        lift = 1.76 / 1.64
        assert mixture.tolist() == pytest.approx([0.5, 0.5 + lift, 1 + lift])
    expected = SIGNALS.per_reward.double() @ (mixture[:2] / mixture[2])
    torch.testing.assert_close(method.combined(SIGNALS).double(), expected, atol=1e-5, rtol=1e-4)


def test_a_floor_without_a_signal_asks_for_nothing():
    """Its own part is 0, and what is left of its gradient is the common pull: not the reward's to defend."""
    own, const = [[-3.0, 1.0], [0.0, 0.0]], [1.0, 0.0]
    signals = made_up(torch.randn(8, 2).sign() * torch.tensor([1.0, 0]), signal=torch.tensor([True, False]))
    free, held = (vectors(Method(config({}, term)), own, const, signals) for term in ({}, {"floor": True}))
    assert free[0] < 0
    torch.testing.assert_close(held, free)


def test_a_floor_whose_gradient_is_not_finite_is_left_out():
    method = Method(config(*FLOOR))
    rows = torch.tensor([[1.0, 0], [torch.nan, 1], [0, 0]], dtype=torch.float64)
    mixture = method.solve(rows @ rows.T, SIGNALS)
    assert mixture[0] > 0
    assert mixture[1:].tolist() == [0, 1]
    assert method.lift.tolist() == [0, 0]


def test_floors_are_lifted_anew_at_every_solve():
    method = Method(config(*FLOOR, refresh=1))
    vectors(method, [[3.0, 0, 0], [-1.0, 0.1, 0]], [0.0, 0, 5], SIGNALS)
    assert (method.lift > 0).any()
    vectors(method, [[1.0, 0, 0], [0, 1.0, 0]], [0.0, 0, 1], SIGNALS)
    assert (method.lift == 0).all()
