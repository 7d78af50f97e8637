import pytest
import torch

from marble import Policy, nft_loss
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


def test_noise_differs_between_micro_batches_and_epochs_but_not_between_runs():
    seeds = [v.noise_seed for e in (0, 1) for part in plan(epoch=e) for v in part]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [v.noise_seed for e in (0, 1) for part in plan(epoch=e) for v in part]


def test_loss_is_taken_where_the_visit_says(untrained):
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12})
    policy.add_adapters(rank=2, alpha=2, targets=["attn.to_q", "attn.to_v"], seed=0)
    with torch.no_grad():
        for p in policy.parameters:
            p.add_(0.2)
    rollout = collect(policy, PromptBatch([Record("a red circle", "x")], 3, [1, 2, 3]), steps=4, images_per_call=8)
    visits = plan(count=3, grid=4, timesteps=1, updates=1)[0][0]
    loss, kl = visit_loss(policy, rollout, visits, Objective(beta=0.5, kl=1.0, timesteps=1))
    sigma = rollout.samples.sigmas[visits.steps]
    noise = torch.randn(rollout.x0.shape, generator=torch.Generator().manual_seed(visits.noise_seed))
    x0 = rollout.x0[visits.images]
    x_t = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
    at = (x_t, sigma, sigma * 1000, rollout.samples.conditioning[visits.images])
    with torch.no_grad():
        theta, old, base = (policy.predict(*at, adapter=a) for a in ("default", "old", None))
    by_hand = nft_loss(x0, theta.x0, old.x0, beta=0.5, amax=5.0)
    torch.testing.assert_close(loss.const, by_hand.const)
    torch.testing.assert_close(loss.slope, by_hand.slope)
    torch.testing.assert_close(kl, (theta.output - base.output).square().mean())
    assert kl > 0
    assert visit_loss(policy, rollout, visits, Objective(kl=0.0, timesteps=1))[1] is None
