"""What each method applies, by hand and against one plain backward pass a reward."""

import pytest
import torch

from marble import min_norm_weights, reference_gradients
from marble.balance.method import Method
from marble.balance.solvers import solve
from marble.catalogue import FROM_GRADIENTS, METHODS
from marble.gradients import gram_of
from marble.rewards import RewardTable

from .toy import IMAGES, config, made_up, signals_for, table_of, vectors, world_of


def assert_close(vector, expected, tolerance=1e-6):
    """Relative to its length; weights meet advantages in single precision."""
    assert (vector - expected).norm() <= tolerance * expected.norm()


@pytest.fixture
def table():
    return table_of()


@pytest.fixture
def signals(table):
    return signals_for(table)


@pytest.fixture
def world():
    return world_of()


def published(world, signals):
    """The paper's direction: min-norm weights of normalised gradients, each averaged where its reward applies."""
    rows = reference_gradients(world.loss, signals.per_reward.double(), world.parameters, signals.applies)
    rows = rows[signals.signal]
    unit = rows / rows.norm(dim=1, keepdim=True)
    return (min_norm_weights(unit @ unit.T) @ unit) * rows.norm(dim=1).mean()


@pytest.mark.parametrize("balance", [{}, {"estimate": "halves"}, {"method": "published"}], ids=str)
def test_parts_are_the_rewards_own_gradients_and_the_common_one(world, signals, balance):
    method = Method(config(**balance))
    columns = torch.cat([signals.per_reward, torch.zeros(IMAGES, 1)], dim=1).double()
    whole = reference_gradients(world.loss, columns, world.parameters)
    expected = torch.cat([whole[:-1] - whole[-1], whole[-1:]])
    torch.testing.assert_close(method.parts() @ world.rows(method, signals), expected, atol=1e-12, rtol=1e-9)


def test_published_solve_to_the_letter(world, signals):
    assert not signals.applies.all()
    method = Method(config(method="published"))
    assert method.to_the_letter
    assert_close(world.exact(method, signals), published(world, signals))


def test_published_between_solves_is_the_plain_combination(world, signals):
    method = Method(config(method="published"))
    world.exact(method, signals)
    expected = signals.per_reward.clamp(-5, 5) @ method.balancer.alpha.float()
    torch.testing.assert_close(method.combined(signals), expected)


def test_published_leaves_out_a_reward_without_signal(table, world):
    table.scores[:, 0] = 0.5
    signals = signals_for(table)
    assert signals.signal.tolist() == [False, True, True]
    direction = world.exact(Method(config(method="published")), signals)
    assert_close(direction, published(world, signals))


EXACT_IS_AMORTISED = [
    {"advantage_scale": "published"},
    {"norms": "raw"},
    {"smooth": "gram"},
    {"gradients": "advantage"},
    {"estimate": "halves"},
    {"estimate": "halves", "smooth": "gram", "gradients": "advantage"},
    {"advantage_scale": "published", "norms": "raw", "estimate": "halves"},
    *({"method": name} for name in METHODS if name in FROM_GRADIENTS and name != "published"),
    {"method": "uniform"},
]


@pytest.mark.parametrize("balance", EXACT_IS_AMORTISED, ids=str)
def test_a_solve_and_an_amortised_update_give_the_same_direction(balance):
    """A solve only saves the second backward pass: same loss, same gradient, in the first update and later on."""
    method = Method(config(**balance))
    assert not method.to_the_letter
    for seed in range(2):
        world, signals = world_of(seed), signals_for(table_of(seed))
        direction = world.exact(method, signals)
        combined = method.combined(signals)
        assert combined.abs().max() < 5
        assert_close(direction, world.at(combined))
        method.advance()


def test_marble_by_hand(world, signals):
    """Min-norm weights over norms, spread matched: the direction from the rewards' whole gradients alone."""
    whole = reference_gradients(world.loss, signals.per_reward.double(), world.parameters)
    unit = whole / whole.norm(dim=1, keepdim=True)
    weights = min_norm_weights(unit @ unit.T) / whole.norm(dim=1)
    advantage = signals.per_reward.double() @ (weights / weights.sum())
    advantage = advantage / advantage[advantage != 0].square().mean().sqrt()
    assert_close(world.exact(Method(config()), signals), world.at(advantage))


def test_mgda_takes_gradients_as_they_are(world, signals):
    whole = reference_gradients(world.loss, signals.per_reward.double(), world.parameters)
    method = Method(config(method="mgda", advantage_scale="published"))
    expected = min_norm_weights(whole @ whole.T) @ whole
    assert_close(world.exact(method, signals), expected)


def test_the_advantage_free_part_can_be_left_out_of_the_balance(world, signals):
    both = torch.cat([signals.per_reward, torch.zeros(IMAGES, 1)], dim=1).double()
    whole = reference_gradients(world.loss, both, world.parameters)
    own = whole[:-1] - whole[-1]
    unit = own / own.norm(dim=1, keepdim=True)
    method = Method(config(gradients="advantage"))
    world.exact(method, signals)
    torch.testing.assert_close(method.balancer.alpha, min_norm_weights(unit @ unit.T), atol=1e-6, rtol=0)
    assert_close(method.balancer.norms, own.norm(dim=1))


@pytest.mark.parametrize("name", ["marble", "uniform", "weighted-sum", "gdpo", "reward-dropout"])
def test_matched_advantages_have_unit_spread(world, signals, name):
    method = Method(config(method=name))
    if method.due():
        world.exact(method, signals)
    else:
        method.advance()
    combined = method.combined(signals)
    assert combined[combined != 0].square().mean().sqrt() == pytest.approx(1, abs=1e-5)


def test_folding_divides_by_each_gradients_norm(world, signals):
    method = Method(config())
    world.exact(method, signals)
    norms = reference_gradients(world.loss, signals.per_reward.double(), world.parameters).norm(dim=1)
    expected = method.balancer.alpha / norms
    assert_close(method.balancer.coefficients, expected / expected.sum())


def test_who_asks_for_gradients():
    asks = {name for name in METHODS if Method(config(method=name)).due()}
    assert asks == {*FROM_GRADIENTS, "uniform"}
    assert not Method(config(method="uniform", norms="raw")).due()


def test_the_last_updates_are_uniform(world, signals):
    method = Method(config(finish=2, norms="raw", advantage_scale="published", smooth="gram", updates=5))
    applied = []
    for _ in range(5):
        if method.due():
            world.exact(method, signals)
        else:
            method.advance()
        applied.append(method.combined(signals))
    uniform = signals.per_reward.clamp(-5, 5).mean(dim=1)
    assert [torch.allclose(a, uniform, atol=1e-6) for a in applied] == [False, False, False, True, True]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_somewhere_sensible(world, signals, name):
    """Finite, and for those that look at gradients not against the mean of the normalised ones."""
    method = Method(config(method=name))
    if method.due():
        direction = world.exact(method, signals)
    else:
        method.advance()
        direction = world.at(method.combined(signals))
    assert direction.isfinite().all()
    assert direction.norm() > 0
    if name in FROM_GRADIENTS:
        whole = reference_gradients(world.loss, signals.per_reward.double(), world.parameters)
        assert (whole / whole.norm(dim=1, keepdim=True)).mean(dim=0) @ direction > 0


# ---- from advantages alone ------------------------------------------------------------------------------


def test_weighted_sum_is_of_raw_scores_and_skips_missing_ones(table, signals):
    raw = torch.nan_to_num(table.scores) @ torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    first = raw[:4]
    expected = (first - first.mean()) / (first.std(correction=0) + 1e-4)
    torch.testing.assert_close(signals.weighted_sum[:4].double(), expected, atol=1e-6, rtol=1e-5)
    method = Method(config(method="weighted-sum", advantage_scale="published", objective={"amax": 1.0}))
    method.advance()
    torch.testing.assert_close(method.combined(signals), signals.weighted_sum.clamp(-1, 1))


def test_a_missing_score_counts_as_its_groups_mean_in_the_sum():
    scores = torch.tensor([[0.8, 1.0], [0.8, torch.nan], [0.8, 1.0]], dtype=torch.float64).repeat(8, 1)
    signals = signals_for(RewardTable(["a", "b"], scores, ~scores.isnan()), torch.ones(2), size=3)
    assert signals.weighted_sum.abs().max() < 1e-6


def test_gdpo_by_hand():
    # sums with priorities 1 and 2: (1, 5, −1, −5, 0, 0), mean 0, variance (1 + 25 + 1 + 25) / 6 = 26 / 3
    signals = made_up(torch.tensor([[1.0, 0], [1, 2], [-1, 0], [-1, -2], [2, -1], [-2, 1]]))
    method = Method(config({}, {"priority": 2.0}, method="gdpo", advantage_scale="published"))
    method.advance()
    expected = torch.tensor([1.0, 5, -1, -5, 0, 0]) / ((26 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(method.combined(signals), expected)


def dropped(updates=200, signal=None, seed=0, terms=({}, {}, {}), **balance):
    """Weights of every update, read off one image a reward, which only that reward tells apart."""
    settings = config(*terms, method="reward-dropout", advantage_scale="published", **balance)
    method = Method(settings.model_copy(update={"seed": seed}))
    signals = made_up(torch.eye(3), signal=signal)
    weights = []
    for _ in range(updates):
        method.advance()
        assert torch.equal(method.combined(signals), method.combined(signals))
        weights.append(method.combined(signals))
    return torch.stack(weights)


def test_dropout_keeps_some_rewards_and_not_the_same_in_every_update():
    weights = dropped()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(200))
    assert torch.equal(weights, dropped())
    assert not torch.equal(weights, dropped(seed=1))
    kept = weights > 0
    assert len(kept.unique(dim=0)) == 7  # every set but the empty one occurs
    # one of three with 1/8 + 3 · 1/8, two with 3/8, three with 1/8: kept 13/24 of the time
    assert kept.float().mean() == pytest.approx(13 / 24, abs=0.05)


def test_dropout_of_nearly_all_still_keeps_one():
    assert ((dropped(dropout=0.999) > 0).sum(dim=1) == 1).all()


def test_dropout_never_keeps_a_reward_without_signal():
    weights = dropped(signal=torch.tensor([True, False, True]))
    assert (weights[:, 1] == 0).all()
    assert ((weights > 0).sum(dim=1) >= 1).all()
    assert dropped(signal=torch.zeros(3, dtype=torch.bool)).isfinite().all()


def test_dropout_weighs_the_kept_by_priority():
    weights = dropped(terms=({}, {"priority": 3.0}, {}))
    everything = weights[(weights > 0).all(dim=1)]
    torch.testing.assert_close(everything[0], torch.tensor([0.2, 0.6, 0.2]))


# ---- priorities, and batches with something amiss ---------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"norms": "raw", "smooth": "gram"}, {"method": "mgda"}], ids=str)
def test_priorities_are_progress_asked_for(settings):
    # orthogonal units, weights 2/3 and 1/3 make the products with the direction 2 : 1
    signals = made_up(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    method = Method(config({"priority": 2.0}, {}, **settings))
    direction = vectors(method, [[1, 0, 0], [0, 1, 0]], [0, 0, 0], signals)
    assert direction[0] / direction[1] == pytest.approx(2)
    assert direction[0] > 0


def test_priorities_count_in_lengths_of_each_gradient():
    signals = made_up(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    method = Method(config({"priority": 2.0}, {}))
    direction = vectors(method, [[10, 0], [0, 0.1]], [0, 0], signals)
    assert direction[0] / direction[1] == pytest.approx(2)  # progress along units: (10 d_0 / 10) : (0.1 d_1 / 0.1)


@pytest.mark.parametrize("balance", [{}, {"estimate": "halves"}, {"method": "published"}, {"method": "mgda"}], ids=str)
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(world, signals, balance):
    method = Method(config(**balance))
    rows = world.rows(method, signals)
    rows[1] = torch.inf
    mixture = method.solve(gram_of(rows), signals)
    assert method.balancer.missing.tolist() == [False, True, False]
    assert method.balancer.left_out.tolist() == [0, 1, 0]
    assert mixture.isfinite().all()
    assert mixture[1] == 0
    direction = mixture[mixture != 0] @ rows[mixture != 0]
    assert direction.isfinite().all()
    assert direction.norm() > 0
    if method.to_the_letter:
        others = reference_gradients(world.loss, signals.per_reward.double(), world.parameters, signals.applies)[::2]
        unit = others / others.norm(dim=1, keepdim=True)
        expected = (min_norm_weights(unit @ unit.T) @ unit) * others.norm(dim=1).mean()
        assert_close(direction, expected)
    method.advance()
    world.exact(method, signals)  # in order again
    assert method.balancer.missing.tolist() == [False, False, False]
    assert method.balancer.left_out.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_which_no_reward_has_a_signal(world, name):
    scores = torch.ones(IMAGES, 3, dtype=torch.float64)
    signals = signals_for(RewardTable(["a", "b", "c"], scores, ~scores.isnan()))
    assert not signals.signal.any()
    method = Method(config(method=name))
    if not method.due():
        method.advance()
    elif name == "published":
        assert method.solve(gram_of(world.rows(method, signals)), signals) is None
    else:  # only the pull that no advantage enters is left
        assert_close(world.exact(method, signals), world.at(torch.zeros(IMAGES)))
    assert (method.combined(signals) == 0).all()
    if name in FROM_GRADIENTS:
        assert method.balancer.left_out.tolist() == [1, 1, 1]
        assert method.balancer.alpha.tolist() == pytest.approx([1 / 3] * 3)


# ---- from one epoch to the next ---------------------------------------------------------------------------


def test_closed_loop_lifts_the_priority_of_what_lags(world, table):
    method = Method(config({"priority": 2.0}, {}, {}, method="closed-loop"))
    for epoch in range(4):
        scores = table.scores.clone()
        scores[:, 0] += 0.02 * epoch  # one standard deviation an epoch
        method.observe(RewardTable(table.names, scores, table.applies))
    wanted = method.balancer.priorities
    assert wanted[0] < 2 < 2 * wanted[1]
    torch.testing.assert_close(wanted, torch.tensor([2.0, 1, 1]).double() * method.controller.priorities)
    plain = Method(config({"priority": 2.0}, {}, {}))
    for each in (method, plain):
        world.exact(each, signals_for(table))
    assert method.balancer.alpha[0] < plain.balancer.alpha[0]


@pytest.mark.parametrize("settings", [{"method": name} for name in METHODS] + [{"smooth": "gram"}], ids=str)
def test_goes_on_from_its_state(table, settings, tmp_path):
    from marble.storage import load_tree, save_tree

    name = settings.get("method", "marble")
    terms = ({"floor": True}, {}, {}) if name in FROM_GRADIENTS and name != "published" else ()
    one, two = Method(config(*terms, **settings)), Method(config(*terms, **settings))
    given = []
    for update in range(6):
        if update == 3:
            save_tree(tmp_path / "state.safetensors", one.state_dict())
            two.load_state_dict(load_tree(tmp_path / "state.safetensors"))
        table, world = table_of(update), world_of(update)
        for method in (one, two) if update >= 3 else (one,):
            method.observe(table)
            if method.due():
                world.exact(method, signals_for(table))
            else:
                method.advance()
            given.append(method.combined(signals_for(table)))
    for update in (3, 5, 7):
        assert torch.equal(given[update], given[update + 1])


@pytest.mark.parametrize("guard", [True, False])
def test_while_rewards_oppose_each_other_none_is_starved(signals, guard):
    # of the rows' Gram: three rewards' own parts, of which the first two nearly cancel, and a common part of no length
    assert signals.signal.all()
    gram = torch.diag(torch.tensor([4.0, 1.0, 9.0, 1e-12], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = -0.98 * 2
    method = Method(config(refresh=1, decay=0.0, guard=guard))
    method.solve(gram, signals)
    assert method.balancer.solution[2] < 0.02  # what min-norm leaves for the reward that nobody opposes
    method.solve(gram, signals)
    norms = gram.diagonal()[:3].sqrt()
    expected = solve("upgrad" if guard else "min-norm", gram[:3, :3] / norms / norms[:, None], torch.ones(3))
    torch.testing.assert_close(method.balancer.alpha, expected, atol=1e-6, rtol=0)
    assert not guard or method.balancer.alpha[2] > 0.2


def test_opposed_rewards_are_remembered_in_a_checkpoint_and_older_ones_know_of_none(signals):
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-12], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = -0.98
    one, two, old = (Method(config(refresh=1)) for _ in range(3))
    one.solve(gram, signals)
    state = one.state_dict()
    two.load_state_dict(state)
    old.load_state_dict({key: value for key, value in state.items() if key != "opposition"})
    for method in (one, two, old):
        method.solve(gram, signals)
    assert torch.equal(one.balancer.alpha, two.balancer.alpha)
    assert not torch.equal(one.balancer.alpha, old.balancer.alpha)
