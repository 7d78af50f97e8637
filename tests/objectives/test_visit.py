import math
from types import SimpleNamespace

import pytest
import torch

from marble import Policy, awm_loss, nft_loss
from marble.config import Objective
from marble.noise import NoiseLevels
from marble.objectives.visit import Visits, _loss, plan_epoch, visit_loss
from marble.policy import Prediction
from marble.prompts import PromptBatch, Record
from marble.rollout import collect


def plan(**changes):
    settings = {"count": 10, "grid": 6, "timesteps": 3, "updates": 2, "micro_batch": 4, "seed": 0, "epoch": 0}
    settings |= changes
    return plan_epoch(settings.pop("count"), settings.pop("grid"), **settings)


@pytest.mark.parametrize("updates", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize("timesteps", [1, 3, 5])
def test_every_image_is_visited_at_so_many_different_steps(updates, micro_batch, timesteps):
    if updates > 10 * timesteps:
        return
    parts = plan(updates=updates, micro_batch=micro_batch, timesteps=timesteps)
    assert len(parts) == updates
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    visited = [(i, s) for part in parts for v in part for i, s in zip(v.images.tolist(), v.steps.tolist(), strict=True)]
    assert len(visited) == len(set(visited)) == 10 * timesteps
    assert {s for _, s in visited} <= set(range(5))  # the last of 6 steps is not trained
    assert all(len(v) <= micro_batch for part in parts for v in part)


def test_a_pass_sees_every_image_once():
    images = torch.cat([v.images for part in plan(updates=3) for v in part])
    for p in range(3):
        assert sorted(images[p * 10 :][:10].tolist()) == list(range(10))


def noises(parts):
    """Noise of every visit, by image (counted over all processes) and step."""
    return {
        (i, s): seed
        for start, part in parts
        for v in part
        for i, s, seed in zip((v.images + start).tolist(), v.steps.tolist(), v.noise_seeds, strict=True)
    }


def test_noise_differs_between_visits_and_epochs_but_not_between_runs():
    seeds = [seed for e in (0, 1) for part in plan(epoch=e) for v in part for seed in v.noise_seeds]
    assert len(set(seeds)) == len(seeds) == 2 * 30
    assert seeds == [seed for e in (0, 1) for part in plan(epoch=e) for v in part for seed in v.noise_seeds]
    assert not set(seeds) & {seed for part in plan(seed=1) for v in part for seed in v.noise_seeds}


def test_noise_does_not_depend_on_the_micro_batch_or_the_update():
    found = [noises([(0, part) for part in plan(**each)]) for each in ({}, {"micro_batch": 1}, {"updates": 7})]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 30


@pytest.mark.parametrize("split", [0, 1, 4, 10])
@pytest.mark.parametrize("updates", [1, 2, 15])
def test_the_plans_of_two_processes_together_are_the_plan_of_one(split, updates):
    whole = plan(updates=updates)
    halves = [(own.start, plan(updates=updates, own=own)) for own in (range(split), range(split, 10))]
    for update, expected in enumerate(whole):
        found = [noises([(start, parts[update])]) for start, parts in halves]
        assert not found[0].keys() & found[1].keys()
        assert found[0] | found[1] == noises([(0, expected)])
    for start, parts in halves:
        held = split if start == 0 and split else 10 - split
        for v in (v for part in parts for v in part):
            assert (v.images >= 0).all()
            assert (v.images < held).all()


@pytest.mark.parametrize(("updates", "split"), [(1, 0), (2, 10), (15, 4)])
def test_no_micro_batch_is_without_images(updates, split):
    """There is nothing to take a loss of."""
    for own in (range(split), range(split, 10)):
        assert all(len(v) for part in plan(updates=updates, own=own) for v in part)


@pytest.mark.parametrize("updates", [1, 5, 15, 30])
@pytest.mark.parametrize(("micro_batch", "tables"), [(4, [0] * 10), (1, [0, 0, 1, 1, 0, 2, 2, 2, 0, 1])])
def test_processes_in_step_make_micro_batches_of_the_same_sizes(updates, micro_batch, tables):
    shares = [range(4), range(4, 7), range(7, 10)]
    made, sizes = [], []
    for own in shares:
        mine = torch.tensor(tables[own.start : own.stop])
        parts = plan(updates=updates, micro_batch=micro_batch, own=own, tables=mine, in_step=shares)
        sizes.append([[len(visits) for visits in part] for part in parts])
        for u, part in enumerate(parts):
            for v in part:
                at = zip(v.images.tolist(), v.steps.tolist(), v.counts.tolist(), strict=True)
                made += [(u, i + own.start, s) for i, s, counts in at if counts]
    assert sizes[0] == sizes[1] == sizes[2]
    alone = plan(updates=updates)
    assert sorted(made) == sorted(
        (u, i, s)
        for u, part in enumerate(alone)
        for v in part
        for i, s in zip(v.images.tolist(), v.steps.tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def policy(untrained):
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12})
    policy.add_adapters(rank=2, alpha=2, targets=["attn.to_q", "attn.to_v"], seed=0)
    with torch.no_grad():
        for p in policy.parameters:
            p.add_(0.2)
    return policy


@pytest.fixture(scope="module")
def rollout(policy):
    return collect(policy, PromptBatch([Record("a red circle", "x")], 3, [1, 2, 3]), steps=4, images_per_call=8)


def at_visits(policy, rollout, visits):
    """The visited clean latents, noise levels and the three adapters' predictions, anew."""
    levels = rollout.samples.levels[visits.steps]
    sigma = levels.sigmas
    seeded = [torch.Generator().manual_seed(seed) for seed in visits.noise_seeds]
    x0 = rollout.x0[visits.images]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in seeded])
    x_t = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(levels.timesteps, sigma * 1000)
    at = (x_t, levels, rollout.samples.conditioning[visits.images])
    with torch.no_grad():
        return x0, sigma, *(policy.predict(*at, adapter=adapter) for adapter in ("default", "old", None))


def test_loss_is_taken_where_the_visit_says(policy, rollout):
    visits = plan(count=3, grid=4, timesteps=1, updates=1)[0][0]
    loss, kl = visit_loss(policy, rollout, visits, Objective(beta=0.5, kl=1.0, timesteps=1))
    x0, _, theta, old, base = at_visits(policy, rollout, visits)
    by_hand = nft_loss(x0, theta.x0, old.x0, beta=0.5, amax=5.0)
    torch.testing.assert_close(loss.const, by_hand.const)
    torch.testing.assert_close(loss.slope, by_hand.slope)
    assert kl.shape == (3,)
    torch.testing.assert_close(kl, (theta.output - base.output).square().mean(dim=(1, 2, 3)))
    assert (kl > 0).all()
    assert kl.requires_grad
    assert visit_loss(policy, rollout, visits, Objective(kl=0.0, timesteps=1))[1] is None


def test_awm_weighs_errors_as_the_velocitys(policy, rollout):
    visits = plan(count=3, grid=4, timesteps=1, updates=1)[0][0]
    settings = Objective(name="awm", clip=0.3, pull=2.0, amax=4.0, kl=0.0, timesteps=1)
    loss, _ = visit_loss(policy, rollout, visits, settings)
    x0, sigma, theta, old, _ = at_visits(policy, rollout, visits)
    by_hand = awm_loss(x0, theta.x0, old.x0, clip=0.3, pull=2.0, amax=4.0, weight=sigma**-2)
    advantages = torch.tensor([[9.0, -1], [1, 2], [-6, 3]])
    torch.testing.assert_close(loss.const, by_hand.const)
    torch.testing.assert_close(loss.slope, by_hand.slope)
    torch.testing.assert_close(loss.effective(advantages), by_hand.effective(advantages))
    gap = (theta.output - old.output).square().mean(dim=(1, 2, 3))  # x0_hat = x_t − sigma v
    torch.testing.assert_close(loss.const, 2.0 * gap, rtol=1e-4, atol=1e-7)
    loss.at(advantages[:, 0]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters)
    policy.denoiser.zero_grad()


def test_a_visits_loss_does_not_depend_on_its_neighbours(policy, rollout):
    settings = Objective(beta=0.5, kl=1.0, timesteps=2)
    together, alone = (plan(count=3, grid=4, timesteps=2, updates=1, micro_batch=size)[0] for size in (6, 1))
    loss, kl = visit_loss(policy, rollout, together[0], settings)
    for n, visits in enumerate(alone):
        one, one_kl = visit_loss(policy, rollout, visits, settings)
        for part, whole in ((one.const, loss.const), (one.slope, loss.slope), (one_kl, kl)):
            torch.testing.assert_close(part[0], whole[n], rtol=1e-4, atol=1e-6)


# ---- the loss in the network's own terms ----------------------------------------------------------------


class Linear:
    """A policy whose outputs are multiples of what it is given, one for each version; in double precision."""

    slopes = (("default", 0.7), ("old", 0.5), (None, 0.4))

    def __init__(self):
        self.slopes = {name: torch.tensor(slope, dtype=torch.float64) for name, slope in type(self).slopes}
        self.slopes["default"].requires_grad_(True)
        self.asked = []

    def predict(self, x_t, levels, conditioning, adapter):
        output = self.slopes[adapter] * x_t + 0.1
        self.asked.append((adapter, output))
        return Prediction(levels.clean(x_t, output), output)


class Texts:
    """No conditioning at all."""

    def __getitem__(self, images):
        return self

    def expanded(self):
        return self


def made_up(prediction, sigmas):
    """Three images of eight numbers, to be visited at these levels."""
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    alphas = 1 - sigmas if prediction == "flow_prediction" else (1 - sigmas**2).sqrt()
    x0 = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = NoiseLevels(alphas, sigmas, 1000 * sigmas, prediction)
    rollout = SimpleNamespace(samples=SimpleNamespace(x0=x0, levels=levels, conditioning=Texts()))
    return rollout, Visits(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2]), (5, 6, 7))


def outputs_at(visits, rollout, policy):
    """`[M, D]`: the target of the network's output at the visits, and the versions' outputs."""
    x0 = rollout.samples.x0[visits.images]
    noise = torch.stack([torch.randn(2, 4, generator=torch.Generator().manual_seed(s)) for s in visits.noise_seeds])
    targets = {"flow_prediction": noise - x0, "epsilon": noise.double()}
    target = targets[rollout.samples.levels.prediction]
    return target.flatten(1), *(dict(policy.asked)[name].flatten(1) for name in ("default", "old"))


@pytest.mark.parametrize(("prediction", "power"), [("flow_prediction", 0), ("epsilon", 1)])
def test_the_loss_on_clean_latents_is_that_on_outputs(prediction, power):
    """In x0 and in the output alike: an error of `gain · e` has `L = gain · mean e² / mean |e|`, times the weight.

    For a velocity that is `sigma mean e² / mean |e|`. For noise the gain is `sigma / alpha` and the weight alpha, so
    that it is the same: the noisiest visits do not drown the others.
    """
    rollout, visits = made_up(prediction, [0.9, 0.5, 0.1])
    policy, beta, amax = Linear(), 0.3, 4.0
    loss, _ = visit_loss(policy, rollout, visits, Objective(beta=beta, amax=amax, kl=0.0, timesteps=1))
    target, theta, old = outputs_at(visits, rollout, policy)
    sigma = rollout.samples.levels.sigmas

    def scaled(output):
        error = output - target
        return sigma * error.square().mean(1) / error.detach().abs().mean(1)

    plus, minus = scaled(beta * theta + (1 - beta) * old), scaled((1 + beta) * old - beta * theta)
    torch.testing.assert_close(loss.const, amax * (plus + minus) / (2 * beta), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.slope, (plus - minus) / (2 * beta), rtol=1e-6, atol=1e-9)
    (found,) = torch.autograd.grad((loss.const + 0.7 * loss.slope).sum(), policy.slopes["default"], retain_graph=True)
    by_hand = amax * (plus + minus) / (2 * beta) + 0.7 * (plus - minus) / (2 * beta)
    (expected,) = torch.autograd.grad(by_hand.sum(), policy.slopes["default"])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_penalty_is_on_outputs_whatever_is_predicted():
    for prediction in ("flow_prediction", "epsilon"):
        rollout, visits = made_up(prediction, [0.9, 0.5, 0.1])
        policy = Linear()
        _, kl = visit_loss(policy, rollout, visits, Objective(kl=0.1, timesteps=1))
        outputs = dict(policy.asked)
        gap = (outputs["default"] - outputs[None]).square().mean(dim=(1, 2))
        torch.testing.assert_close(kl, gap)
        assert kl.requires_grad


def one_number(prediction, alpha, x0, theta, old):
    """The arguments of `_loss` for an image of one number at sigma 0.8."""
    levels = NoiseLevels(torch.tensor([alpha]), torch.tensor([0.8]), torch.tensor([500.0]), prediction)
    x0, theta, old = (torch.tensor([[value]]) for value in (x0, theta, old))
    return x0, Prediction(theta, theta), Prediction(old, old), levels


# x0 = 2, theta says 3 and old 2.5; beta 0.5: x+ = 2.75 and x− = 2.25, L+ = 0.75² / 0.75 = 0.75, L− = 0.25;
# const = 5 · 1 / (2 · 0.5) = 5 and slope = 0.5, times alpha = 0.6 where noise is predicted and sigma where x0 is.
@pytest.mark.parametrize(
    ("prediction", "weight"), [("flow_prediction", 1.0), ("v_prediction", 1.0), ("epsilon", 0.6), ("sample", 0.8)]
)
def test_nft_by_hand(prediction, weight):
    loss = _loss(*one_number(prediction, 0.6, 2.0, 3.0, 2.5), Objective(beta=0.5, amax=5.0, timesteps=1))
    assert loss.const.item() == pytest.approx(5 * weight)
    assert loss.slope.item() == pytest.approx(0.5 * weight)
    assert loss.effective(torch.tensor([[7.0, -9.0, 1.0]])).tolist() == [[5.0, -5.0, 1.0]]


# Noise moves x0 by 0.8 / 0.6, so errors of noise are 0.75² = 0.5625 times those of x0: 0.5625 and 0.140625;
# the ratio is exp(0.140625 − 0.5625), the pull 2 · 0.5625 · 0.25. Errors of a velocity: 1 / 0.64 times.
@pytest.mark.parametrize(
    ("prediction", "slope", "const"),
    [
        ("epsilon", -math.exp(-0.421875), 0.28125),
        ("flow_prediction", -math.exp(-0.75 / 0.64), 0.5 / 0.64),
        ("sample", -math.exp(-0.75), 0.5),
    ],
)
def test_awm_by_hand(prediction, slope, const):
    settings = Objective(name="awm", pull=2.0, timesteps=1)
    loss = _loss(*one_number(prediction, 0.6, 2.0, 3.0, 2.5), settings)
    assert loss.slope.item() == pytest.approx(slope, rel=1e-5)
    assert loss.const.item() == pytest.approx(const, rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_a_plan_by_tables_visits_the_same_and_mixes_none(micro_batch):
    tables = torch.tensor([0, 1, 0, 2, 2, 1, 0, 0, 2, 1])
    parts = plan(tables=tables, micro_batch=micro_batch, updates=3)
    assert all(len(tables[v.images].unique()) == 1 for part in parts for v in part)
    for part, without in zip(parts, plan(updates=3), strict=True):
        assert noises([(0, part)]) == noises([(0, without)])
