"""One update through a real pipeline: exact, amortised, diagnosed, in micro-batches of any size, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from marble import min_norm_weights, reference_gradients
from marble.catalogue import METHODS
from marble.objectives.visit import Visits, visit_loss
from marble.step import plan_updates

from .small import IMAGES, REWARDS, Trial, config_of, flat, signals_for


@pytest.fixture(scope="module")
def trial(untrained):
    return Trial.of(untrained)


def assert_same_step(trial, found, expected, tolerance=1e-4):
    """Two sets of parameters, compared by how far each went."""
    went = (expected - trial.origin).norm()
    assert went > 1e-3
    assert (found - expected).norm() <= tolerance * went


def joined(plan):
    """A plan's micro-batches as one."""
    images, steps = (torch.cat([getattr(v, part) for v in plan]) for part in ("images", "steps"))
    shares = None if plan[0].shares is None else torch.cat([v.shares for v in plan])
    return Visits(images, steps, tuple(seed for v in plan for seed in v.noise_seeds), None, shares)


class ByHand:
    """The same update from one forward pass over all its visits and plain backward passes."""

    def __init__(self, trial, config, signals=None, plan=None):
        trial.parts(config)  # back to the start
        self.trial, self.config = trial, config
        self.signals = signals_for() if signals is None else signals
        self.visits = joined(trial.plan(config)[0] if plan is None else plan)
        self.loss, self.kl = visit_loss(trial.policy, trial.rollout, self.visits, config.objective)
        self.parameters = trial.policy.parameters

    def gradient(self, losses):
        parts = torch.autograd.grad(losses.mean(), self.parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def columns(self, advantages):
        """`[·, P]` gradients of whole losses, one an advantage, averaged over all visits."""
        return reference_gradients(self.loss, advantages[self.visits.images], self.parameters)

    def step(self, direction):
        updater = self.trial.parts(self.config).updater
        updater.apply(direction.split([p.numel() for p in updater.policy.parameters]))
        return flat(self.parameters)


def test_marble(trial):
    config = config_of()
    hand = ByHand(trial, config)
    whole = hand.columns(hand.signals.per_reward).double()
    unit = whole / whole.norm(dim=1, keepdim=True)
    weights = min_norm_weights(unit @ unit.T) / whole.norm(dim=1)
    advantage = hand.signals.per_reward @ (weights / weights.sum()).float()
    advantage = advantage / advantage.square().mean().sqrt()
    expected = hand.step(hand.columns(advantage[:, None])[0])
    found, metrics, parts = trial.run(config)
    assert_same_step(trial, found, expected)
    assert metrics[0]["refreshed"]
    assert metrics[0]["update"] == 1
    assert metrics[0]["coefficients"] == pytest.approx((weights / weights.sum()).tolist(), rel=1e-4)
    torch.testing.assert_close(parts.method.combined(hand.signals), advantage, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kl", [0.0, 2.0])
def test_published(trial, kl):
    """The penalty on the distance to the base model is added to the direction, not balanced."""
    config = config_of(balance={"method": "published"}, objective={"kl": kl})
    hand = ByHand(trial, config)
    share = hand.signals.applies.float().mean(dim=0)
    applies = hand.signals.applies[hand.visits.images]
    assert torch.equal(applies.float().mean(dim=0), share)  # every image is visited as often as the others
    advantages = hand.signals.per_reward[hand.visits.images]
    rows = reference_gradients(hand.loss, advantages, hand.parameters, applies).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    direction = ((min_norm_weights(unit @ unit.T) @ unit) * rows.norm(dim=1).mean()).float()
    if kl:
        penalty = hand.gradient(hand.kl)
        assert (kl * penalty).norm() > 0.03 * direction.norm()
        direction = direction + kl * penalty
    found, metrics, _ = trial.run(config)
    assert_same_step(trial, found, hand.step(direction))
    assert (metrics[0]["kl"] > 0) == (kl > 0)


@pytest.mark.parametrize(
    "balance", [{}, {"estimate": "halves", "smooth": "gram"}, {"method": "uniform"}, {"method": "mgda"}], ids=str
)
def test_an_exact_update_is_one_backward_of_the_combined_loss_and_the_penalty(trial, balance):
    config = config_of(balance=balance, objective={"kl": 0.3})
    found, metrics, parts = trial.run(config)
    combined = parts.method.combined(signals_for())
    hand = ByHand(trial, config)
    direction = hand.gradient(hand.loss.at(combined[hand.visits.images]) + 0.3 * hand.kl)
    assert_same_step(trial, found, hand.step(direction))
    assert metrics[0]["kl"] == pytest.approx(hand.kl.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["weighted-sum", "gdpo", "reward-dropout"])
def test_an_update_from_advantages_alone(trial, name):
    config = config_of(balance={"method": name}, objective={"kl": 0.3})
    found, metrics, parts = trial.run(config)
    combined = parts.method.combined(signals_for())
    hand = ByHand(trial, config)
    direction = hand.gradient(hand.loss.at(combined[hand.visits.images]) + 0.3 * hand.kl)
    assert_same_step(trial, found, hand.step(direction))
    assert metrics[0]["loss"] == pytest.approx(hand.loss.at(combined[hand.visits.images]).mean().item(), rel=1e-4)
    assert "alpha" not in metrics[0]


@pytest.mark.parametrize("balance", [{}, {"method": "weighted-sum"}, {"refresh": 1}], ids=str)
def test_every_visit_counts_for_its_share(trial, balance, monkeypatch):
    config = config_of(balance=balance, objective={"kl": 0.3})
    even = trial.plan(config)[0]
    shares = torch.rand(sum(map(len, even)), generator=torch.Generator().manual_seed(1)) * 2
    each = shares.split([len(v) for v in even])
    plan = [replace(v, shares=own) for v, own in zip(even, each, strict=True)]
    monkeypatch.setattr(Trial, "plan", staticmethod(lambda *_, **__: [plan]))
    found, metrics, parts = trial.run(config)
    combined = parts.method.combined(signals_for())
    hand = ByHand(trial, config, plan=plan)
    losses = hand.loss.at(combined[hand.visits.images])
    assert_same_step(trial, found, hand.step(hand.gradient(shares * (losses + 0.3 * hand.kl))))
    assert metrics[0]["loss"] == pytest.approx((shares * losses).mean().item(), rel=1e-4)
    assert metrics[0]["kl"] == pytest.approx((shares * hand.kl).mean().item(), rel=1e-4)


def planned(trial, signals, **settings):
    config = config_of(**settings)
    batch = trial.rollout.batch
    return plan_updates(config, trial.parts(config), trial.rollout, batch, [range(len(batch.prompts))], 0, signals)


def listed(plan):
    return [(v.images.tolist(), v.steps.tolist(), v.noise_seeds, v.weights.tolist()) for part in plan for v in part]


def test_marble_plans_by_importance_and_other_methods_evenly(trial):
    signals = signals_for()
    found = planned(trial, signals)[0][0]
    assert found.shares is not None
    assert (found.shares != 1).any()
    assert listed(planned(trial, signals, balance={"visits": "even"})) == listed(Trial.plan(config_of()))
    assert planned(trial, signals, balance={"method": "weighted-sum"})[0][0].shares is None


def test_advantages_are_clipped_before_visits_are_planned(trial):
    signals, amax = signals_for(), config_of().objective.amax
    far = replace(signals, per_reward=signals.per_reward * 1000)
    near = replace(signals, per_reward=far.per_reward.clamp(-amax, amax))
    assert listed(planned(trial, far)) == listed(planned(trial, near))
    assert listed(planned(trial, far)) != listed(planned(trial, signals))


def test_sums_plan_by_the_advantage_that_they_follow(trial):
    signals = signals_for()
    settings = {"balance": {"method": "weighted-sum", "visits": "importance"}}
    alike = signals.weighted_sum[:, None].expand_as(signals.per_reward)
    expected = planned(trial, replace(signals, per_reward=alike))
    assert listed(planned(trial, signals, **settings)) == listed(expected)


@pytest.mark.parametrize("method", ["marble", "published"])
def test_a_solve_on_a_share_of_the_micro_batches(trial, method):
    """The direction of the first two of three, and the plain combined loss by the fresh weights on the third."""
    config = config_of(balance={"method": method, "solve_share": 0.5}, objective={"kl": 0.1})
    plan = trial.plan(config)[0]
    assert list(map(len, plan)) == [8, 8, 8]
    found, _, parts = trial.run(config)
    signals = signals_for()
    combined, coefficients = parts.method.combined(signals), parts.method.balancer.coefficients
    head = ByHand(trial, config, plan=plan[:2])
    columns = signals.per_reward[head.visits.images]
    if method == "marble":
        with_penalty = replace(head.loss, const=head.loss.const + 0.1 * head.kl)
        whole = reference_gradients(with_penalty, columns, head.parameters).double()
        unit = whole / whole.norm(dim=1, keepdim=True)
        weights = min_norm_weights(unit @ unit.T) / whole.norm(dim=1)
        torch.testing.assert_close(coefficients, weights / weights.sum(), atol=1e-5, rtol=1e-4)
        first = head.gradient(with_penalty.at(combined[head.visits.images]))
    else:
        # averaged by the share of all images that a reward applies to, which these visits' need not be exactly
        applies = signals.applies[head.visits.images].float()
        sums = [head.gradient(applies[:, k] * head.loss.at(columns[:, k])) for k in range(REWARDS)]
        rows = (torch.stack(sums) / signals.applies.float().mean(dim=0)[:, None]).double()
        unit = rows / rows.norm(dim=1, keepdim=True)
        alpha = min_norm_weights(unit @ unit.T)
        torch.testing.assert_close(coefficients, alpha, atol=1e-5, rtol=1e-4)
        first = (alpha @ unit * rows.norm(dim=1).mean()).float() + 0.1 * head.gradient(head.kl)
    tail = ByHand(trial, config, plan=plan[2:])
    second = tail.gradient(tail.loss.at(combined[tail.visits.images]) + 0.1 * tail.kl)
    assert_same_step(trial, found, tail.step((2 * first + second) / 3))


@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize("method", ["marble", "published", "weighted-sum"])
def test_the_size_of_a_micro_batch_changes_nothing(trial, method, size):
    balance, objective = {"method": method, "refresh": 2}, {"kl": 0.1}
    expected, _, _ = trial.run(config_of(balance=balance, objective=objective), epochs=2)
    config = config_of(balance=balance, objective=objective, optimizer={"micro_batch": size})
    assert_same_step(trial, trial.run(config, epochs=2)[0], expected, tolerance=2e-3)


DIAGNOSED = [
    {},
    {"method": "published"},
    {"method": "weighted-sum"},
    {"method": "gdpo"},
    {"method": "reward-dropout"},
    {"estimate": "halves", "smooth": "gram"},
    {"refresh": 2},
    {"method": "published", "refresh": 2},
]


@pytest.mark.parametrize("balance", DIAGNOSED, ids=str)
def test_diagnosing_an_update_does_not_change_what_it_does(trial, balance):
    """Exact and amortised, with micro-batches of several sizes and the penalty."""
    found, plain = (
        trial.run(config_of(balance=balance, objective={"kl": 0.1}, diagnose_every=every), epochs=2) for every in (1, 0)
    )
    assert_same_step(trial, found[0], plain[0], tolerance=1e-4)
    for one, other in zip(found[1], plain[1], strict=True):
        assert {"cosine/applied", "cosine_advantage/weighted_sum", "reward_cosines"} <= one.keys() - other.keys()
        for key in other.keys() - {"update_seconds"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_an_amortised_update_masks_every_reward_for_itself(trial):
    """With AWM's ratios out of bounds, a reward's mask goes by its own advantage's sign, not by the mixture's."""
    settings = {"balance": {"method": "uniform", "norms": "raw"}, "objective": {"name": "awm", "clip": 0.001}}
    config = config_of(**settings)
    found, _, parts = trial.run(config)
    hand = ByHand(trial, config)
    _, weights = parts.method.mixed(hand.signals)
    by_reward = weights @ hand.columns(hand.signals.per_reward)
    free = hand.gradient(hand.loss.const)
    expected = by_reward + (1 - weights.sum()) * free
    masked = hand.gradient(hand.loss.at(parts.method.combined(hand.signals)[hand.visits.images]))
    assert (masked - expected).norm() > 0.01 * expected.norm()
    assert_same_step(trial, found, hand.step(expected))


def test_diagnosing_does_not_change_a_solve_on_a_share(trial):
    balance = {"solve_share": 0.3}
    found, plain = (trial.run(config_of(balance=balance, diagnose_every=every))[0] for every in (1, 0))
    assert_same_step(trial, found, plain)


@pytest.mark.parametrize("epoch", [0, 1], ids=["exact", "amortised"])
def test_diagnosed_cosines(trial, epoch):
    """All three directions, against the rewards' own gradients taken one by one where the update began."""
    config = config_of(balance={"refresh": 2}, diagnose_every=1)
    update = trial.run(config, epochs=epoch + 1)[1][-1]
    _, _, parts = trial.run(config)
    if epoch == 0:
        trial.parts(config)  # back to the start
    else:
        parts.method.advance()
    signals, visits = signals_for(epoch), joined(trial.plan(config, epoch)[0])
    loss, _ = visit_loss(trial.policy, trial.rollout, visits, config.objective)
    columns = [signals.per_reward, signals.weighted_sum[:, None], parts.method.combined(signals)[:, None]]
    columns = torch.cat([*columns, torch.zeros(IMAGES, 1)], dim=1)[visits.images]
    rows = reference_gradients(loss, columns, trial.policy.parameters).double()
    for kind, each in (("cosine", rows[:-1]), ("cosine_advantage", rows[:-1] - rows[-1])):
        unit = each / each.norm(dim=1, keepdim=True)
        cosines = (unit[:3] @ unit.T).min(dim=0).values
        assert update[f"{kind}/weighted_sum"] == pytest.approx(cosines[3].item(), abs=1e-4)
        assert update[f"{kind}/applied"] == pytest.approx(cosines[4].item(), abs=1e-4)
        fresh = min_norm_weights(unit[:3] @ unit[:3].T) @ unit[:3]
        assert update[f"{kind}/fresh"] == pytest.approx(((unit[:3] @ fresh).min() / fresh.norm()).item(), abs=1e-4)
    torch.testing.assert_close(
        torch.tensor(update["reward_cosines"]).double(), unit[:3] @ unit[:3].T, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_policy(trial, method):
    config = config_of(balance={"method": method, "refresh": 2}, objective={"kl": 0.1}, diagnose_every=2)
    found, metrics, _ = trial.run(config, epochs=2)
    assert found.isfinite().all()
    assert (found - trial.origin).norm() > 1e-3
    assert all(math.isfinite(each["loss"]) and each["gradient_norm"] > 0 for each in metrics)
    assert ("progress" in metrics[0]) == (method == "closed-loop")


def test_awm_and_floors(trial):
    objective = {"name": "awm", "clip": 1.0, "pull": 1.0}
    rewards = [{"reward": "r0", "floor": True}, {"reward": "r1", "priority": 2.0}, {"reward": "r2"}]
    found, metrics, _ = trial.run(config_of(objective=objective, rewards=rewards, diagnose_every=1))
    assert found.isfinite().all()
    assert metrics[0]["gradient_norm"] > 0


# ---- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["marble", "published"])
def test_a_reward_without_a_signal_is_said_to_be_left_out(trial, method):
    found, metrics, _ = trial.run(config_of(balance={"method": method}), epochs=2, spoilt=(1,))
    assert found.isfinite().all()
    assert [each["left_out"] for each in metrics] == [{"r1": 1}, {"r1": 2}]
    assert metrics[0]["signal"] == [True, False, True]


def test_rewards_that_oppose_each_other_are_named(trial, monkeypatch):
    monkeypatch.setattr("marble.balance.opposition._SOLVES", 1)
    monkeypatch.setattr("marble.balance.opposition._OPPOSED", 1.1)  # every pair's cosine is below that
    _, metrics, _ = trial.run(config_of())
    assert metrics[0]["opposed"] == [["r0", "r1"], ["r0", "r2"], ["r1", "r2"]]
    _, metrics, _ = trial.run(config_of(balance={"guard": False}))
    assert "opposed" not in metrics[0]


def test_published_without_any_signal_only_feels_the_penalty(trial):
    spoilt = tuple(range(REWARDS))
    found, metrics, _ = trial.run(config_of(balance={"method": "published"}, diagnose_every=1), spoilt=spoilt)
    assert torch.equal(found, trial.origin)
    assert metrics[0]["gradient_norm"] == 0
    assert "cosine/applied" not in metrics[0]
    config = config_of(balance={"method": "published"}, objective={"kl": 0.3})
    found, _, _ = trial.run(config, spoilt=spoilt)
    hand = ByHand(trial, config)
    assert_same_step(trial, found, hand.step(0.3 * hand.gradient(hand.kl)))


def test_a_reward_whose_gradient_overflows_is_left_out_and_the_rest_goes_on(trial, monkeypatch):
    """Also from the diagnosis, where the other rewards' cosines stay what they were."""
    accumulate = type(trial.parts(config_of()).engine).accumulate

    def overflowing(engine, rows, *arguments, **options):
        accumulate(engine, rows, *arguments, **options)
        for parameter in range(len(rows.sizes)):
            rows.block(0, parameter)[1] = torch.inf

    _, plain, _ = trial.run(config_of(diagnose_every=1))
    monkeypatch.setattr("marble.gradients.engine.PerRewardGradients.accumulate", overflowing)
    found, metrics, _ = trial.run(config_of(diagnose_every=1))
    assert found.isfinite().all()
    assert (found - trial.origin).norm() > 1e-3
    assert metrics[0]["left_out"] == {"r1": 1}
    assert metrics[0]["reward_cosines"][1] == [0, 0, 0]
    assert metrics[0]["reward_cosines"][0][2] == pytest.approx(plain[0]["reward_cosines"][0][2], abs=1e-5)
