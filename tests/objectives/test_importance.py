"""Where visits go, and that nothing changes on average."""

import itertools

import pytest
import torch

from marble.config import make_config
from marble.errors import MarbleError
from marble.objectives.importance import StepNorms, expected_visits
from marble.objectives.visit import Visits, plan_epoch, visit_loss
from marble.policy import Policy
from marble.prompts import PromptBatch, Record
from marble.rollout import collect
from marble.seeds import derive

GRID = 5  # four steps are trained


def advantages(count=24, seed=0):
    """Two rewards, the second of which judges a sixth of the images."""
    found = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    found[count // 6 :, 1] = 0
    return found


def plan(expected, epoch=0, **settings):
    settings = {"timesteps": 2, "updates": 3, "micro_batch": 7, "seed": 0, "epoch": epoch, **settings}
    return plan_epoch(len(expected), GRID, expected=expected, **settings)


def numbers(parts, count):
    """How often each image is visited at each step, and what all of its visits there count for."""
    times, worth = torch.zeros(count, GRID - 1), torch.zeros(count, GRID - 1)
    for visits in itertools.chain(*parts):
        at = (visits.images, visits.steps)
        times.index_put_(at, torch.ones(len(visits)), accumulate=True)
        worth.index_put_(at, visits.weights, accumulate=True)
    return times, worth


def test_hand_worked():
    """Sizes of images: sqrt(1/2), sqrt(1/2), and 1 where the second reward judges alone; of steps 2 and 1."""
    found = expected_visits(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.3]]), torch.tensor([2.0, 1.0]), 1)
    factor = 3 / (3 * (1 + 2 * 0.5**0.5))
    expected = factor * torch.tensor([[2**0.5, 0.5**0.5], [2**0.5, 0.5**0.5], [2.0, 1.0]])
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("most", [1.0, float("inf")])
@pytest.mark.parametrize("timesteps", [1, 2, 4])
def test_the_number_of_visits_is_kept_and_none_is_far_from_even(timesteps, most):
    found = expected_visits(advantages(), torch.tensor([100.0, 10.0, 1.0, 0.0]), timesteps, most=most)
    assert found.sum().item() == pytest.approx(24 * timesteps, rel=1e-9)
    even = timesteps / 4
    assert found.min() >= even / 4 - 1e-12
    assert found.max() <= min(even * 4, most) + 1e-12
    assert found.max() > even or most == 1 == even


@pytest.mark.parametrize(
    "scores", [torch.zeros(6, 2), torch.eye(6)[:, :1], torch.tensor([[1e30, 0.0]] * 3 + [[0.0, 1e-30]] * 3)]
)
@pytest.mark.parametrize("norms", [torch.zeros(4), torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.ones(4)])
def test_what_says_nothing_is_visited_all_the_same(scores, norms):
    found = expected_visits(scores, norms, 2)
    assert found.sum().item() == pytest.approx(12)
    assert found.isfinite().all()
    assert found.min() >= 0.125


def test_a_rewards_scale_does_not_matter():
    norms = torch.tensor([3.0, 2.0, 1.0, 0.5])
    scaled = advantages() * torch.tensor([1.0, 1000.0])
    torch.testing.assert_close(expected_visits(scaled, norms, 2), expected_visits(advantages(), norms, 2))


def test_an_epochs_visits_are_the_expected_ones_up_or_down():
    expected = expected_visits(advantages(), torch.tensor([3.0, 2.0, 1.0, 0.5]), 2)
    for epoch in range(20):
        times, _ = numbers(plan(expected, epoch), 24)
        assert times.sum() == 48
        assert ((times - expected).abs() < 1).all()


def test_on_average_every_image_counts_at_every_step_as_with_even_visits():
    expected = expected_visits(advantages(), torch.tensor([3.0, 2.0, 1.0, 0.5]), 2)
    worth = torch.stack([numbers(plan(expected, epoch), 24)[1] for epoch in range(1000)])
    even = 0.5
    spread = worth.std(dim=0) / 1000**0.5
    assert ((worth.mean(dim=0) - even).abs() < 5 * spread + 1e-3).all()
    torch.testing.assert_close(worth.mean(), torch.tensor(even), rtol=0.02, atol=0)


def test_a_visit_has_noise_of_its_own_even_at_the_same_step():
    expected = torch.full((2, GRID - 1), 3.0)
    parts = plan(expected, timesteps=12)
    seeds = [seed for visits in itertools.chain(*parts) for seed in visits.noise_seeds]
    assert len(set(seeds)) == len(seeds) == 24


def test_an_images_visits_are_spread_over_the_updates():
    expected = torch.full((10, GRID - 1), 1.5)
    for update in plan(expected, timesteps=6, updates=6):
        visited = torch.cat([visits.images for visits in update]).bincount(minlength=10)
        assert visited.max() <= 2


@pytest.mark.parametrize("split", [0, 5, 24])
def test_the_plans_of_two_processes_together_are_the_plan_of_one(split):
    expected = expected_visits(advantages(), torch.tensor([3.0, 2.0, 1.0, 0.5]), 2)

    def listed(parts, start=0):
        return [
            sorted(
                (int(i) + start, int(t), seed, float(w))
                for v in part
                for i, t, seed, w in zip(v.images, v.steps, v.noise_seeds, v.weights, strict=True)
            )
            for part in parts
        ]

    first = listed(plan(expected, own=range(split)))
    second = listed(plan(expected, own=range(split, 24)), split)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == listed(plan(expected))


def test_idle_visits_count_for_nothing():
    expected = expected_visits(advantages(), torch.tensor([3.0, 2.0, 1.0, 0.5]), 2)
    shares = [range(4), range(4, 24)]
    parts = [v for own in shares for update in plan(expected, own=own, in_step=shares) for v in update]
    assert sum(int((v.weights == 0).sum()) for v in parts) > 0
    assert sum(float(v.counts.sum()) for v in parts) == 48
    assert [len(half) for half in parts[0].split(3)] == [3, 3, 1]
    torch.testing.assert_close(torch.cat([half.weights for half in parts[0].split(3)]), parts[0].weights)


def test_a_process_none_of_whose_images_is_visited_keeps_step():
    expected = torch.full((8, GRID - 1), 0.03)
    expected[:4] = 2 / 4 - 0.03  # two processes of four images, one visit an image
    shares, made = [range(4), range(4, 8)], []
    for epoch in range(30):
        plans = [plan(expected, epoch, timesteps=1, own=own, in_step=shares) for own in shares]
        assert [[len(v) for v in part] for part in plans[0]] == [[len(v) for v in part] for part in plans[1]]
        assert all((v.images >= 0).all() and (v.images < 4).all() for part in plans[1] for v in part)
        made.append(sum(float(v.counts.sum()) for part in plans[1] for v in part))
        assert made[-1] + sum(float(v.counts.sum()) for part in plans[0] for v in part) == 8
    assert min(made) == 0


def test_the_same_visits_leave_less_noise():
    """Each visit adds a vector of its own; the sum over an epoch is estimated from half as many."""
    rng = torch.Generator().manual_seed(3)
    lengths = torch.tensor([4.0, 2.0, 1.0, 0.2])
    parts, scores = torch.randn(24, 4, 30, generator=rng) * lengths[:, None], advantages()

    def noise(expected):
        found = []
        for epoch in range(150):
            _, worth = numbers(
                plan(expected, epoch)
                if expected is not None
                else plan_epoch(24, GRID, timesteps=2, updates=3, micro_batch=7, seed=0, epoch=epoch),
                24,
            )
            found.append(torch.einsum("nt,ntp,nk->kp", worth, parts, scores))
        return torch.stack(found).var(dim=0).sum(dim=1)

    ratio = noise(expected_visits(scores, lengths, 2)) / noise(None)
    assert (ratio < 0.75).all()
    assert ratio[1] < 0.5  # the reward that judges few


@pytest.fixture(scope="module")
def policy(untrained):
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12})
    policy.add_adapters(rank=2, alpha=2, targets=["attn.to_q", "attn.to_v"], seed=0)
    return policy


@pytest.fixture(scope="module")
def rollout(policy):
    return collect(
        policy, PromptBatch([Record("a red circle", "x")], 6, [1, 2, 3, 4, 5, 6]), steps=4, images_per_call=8
    )


OBJECTIVE = make_config(
    {"model": {"id": "mini"}, "prompts": [{"source": "mini-words"}], "rewards": [{"reward": "mini-text"}]}
).objective


def test_norms_are_those_of_slopes_gradients(policy, rollout):
    measured = StepNorms().measure(policy, rollout, OBJECTIVE, [range(6)], seed=7, epoch=0, scale=8.0)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(derive(7, "probes", 0)))
    for step in range(3):
        visit = Visits(order[step : step + 1], torch.tensor([step]), (derive(7, "probe", 0, step),))
        loss, _ = visit_loss(policy, rollout, visit, OBJECTIVE)
        grads = torch.autograd.grad(loss.slope.sum(), policy.parameters, allow_unused=True)
        length = torch.cat([g.flatten() for g in grads if g is not None]).norm()
        assert length > 0
        assert measured[step].item() == pytest.approx(length.item(), rel=1e-4)
    assert all(p.grad is None for p in policy.parameters)


def test_norms_are_averaged_over_epochs_and_go_on_from_a_checkpoint(policy, rollout):
    def measure(norms, epoch):
        return norms.measure(policy, rollout, OBJECTIVE, [range(6)], seed=7, epoch=epoch)

    alone = [measure(StepNorms(), epoch) ** 2 for epoch in range(3)]
    norms = StepNorms()
    for epoch in range(2):
        measure(norms, epoch)
    resumed = StepNorms()
    resumed.load_state_dict(norms.state_dict())
    expected = (0.81 * alone[0] + 0.9 * alone[1] + alone[2]) / 2.71
    for each in (norms, resumed):
        torch.testing.assert_close(measure(each, 2) ** 2, expected)


def test_what_is_not_finite_or_nothing_counts_for_nothing(policy, rollout):
    norms = StepNorms()
    arguments = (policy, rollout, OBJECTIVE, [range(6)])
    with torch.no_grad():
        held = [p.clone() for p in policy.parameters]
        for p in policy.parameters:
            p.fill_(float("nan"))
    unknown = norms.measure(*arguments, seed=7, epoch=0)
    with torch.no_grad():
        for p, value in zip(policy.parameters, held, strict=True):
            p.copy_(value)
    assert unknown.tolist() == [1.0, 1.0, 1.0]
    good = norms.measure(*arguments, seed=7, epoch=0)
    assert norms.state_dict()["mass"] == pytest.approx(0.1)
    torch.testing.assert_close(good, StepNorms().measure(*arguments, seed=7, epoch=0))


def test_published_refuses():
    with pytest.raises(MarbleError, match=r"balance\.visits: published has even ones, got importance"):
        make_config(
            {
                "model": {"id": "mini"},
                "prompts": [{"source": "mini-words"}],
                "rewards": [{"reward": "mini-text"}],
                "balance": {"method": "published", "visits": "importance"},
            }
        )
