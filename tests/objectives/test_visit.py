import pytest
import torch

from marble import Policy, awm_loss, nft_loss
from marble.config import Objective
from marble.objectives.visit import plan_epoch, visit_loss
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
