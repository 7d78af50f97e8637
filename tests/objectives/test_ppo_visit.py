"""PPO where the sampler stepped: trajectories, and losses on them, of a flow, a noise and a v-prediction model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from marble import PerRewardGradients, Policy, reference_gradients
from marble.config import Objective
from marble.noise import NoiseLevels, Trajectory, transitions_of
from marble.objectives.visit import Visits, plan_epoch, visit_loss, where_broken
from marble.policy import Prediction
from marble.prompts import PromptBatch, Record
from marble.rollout import collect

from ..pipelines import FAMILIES, FURTHER, LATER, build, call_of

MODELS = ("sd3", "sd15", "sd15-v")  # a flow's velocity, noise, v
STEPS, GROUP = 5, 3
TEXTS = ["a cat", "two dogs here"]
IMAGES = GROUP * len(TEXTS)
BATCH = PromptBatch([Record(text, "x") for text in TEXTS], GROUP, list(range(IMAGES)))
PPO = Objective(name="ppo", kl=0.0, timesteps=2)


@pytest.fixture(scope="module", params=MODELS)
def policy(request, tmp_path_factory):
    """Sampling and trained weights are one, and not the base's."""
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    policy = Policy.from_pretrained(str(folder), call=call_of(request.param), device="cpu")
    policy.add_adapters(rank=2, alpha=4, targets=["to_q", "to_v"], seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    policy.copy_adapter("default", "old")
    return policy


def sampled(policy, batch=IMAGES, scheduler="sde", **options):
    return collect(policy, BATCH, steps=STEPS, images_per_call=batch, scheduler=scheduler, **options)


@pytest.fixture(scope="module")
def rollout(policy):
    return sampled(policy)


def every_visit():
    """All images at all steps but the last."""
    images, steps = torch.meshgrid(torch.arange(IMAGES), torch.arange(STEPS - 1), indexing="ij")
    return Visits(images.flatten(), steps.flatten(), tuple(range(images.numel())))


def penalised(kl):
    return PPO.model_copy(update={"kl": kl})


def ratios(loss):
    return -loss.slope.detach()


# ---- trajectories -----------------------------------------------------------------------------------------


def test_steps_are_noted_from_noise_to_image(policy, rollout):
    trajectory = rollout.samples.trajectory
    assert trajectory.latents.shape == (IMAGES, STEPS, *rollout.x0.shape[1:])
    assert trajectory.log_probs.shape == (IMAGES, STEPS - 1)
    assert trajectory.log_probs.isfinite().all()
    assert trajectory.latents[:, 0].std().item() == pytest.approx(1, abs=0.2)
    # the last step, from the last latents noted, ends at x0: one standard deviation off at most
    last = torch.full((IMAGES,), STEPS - 1)
    at = (trajectory.latents[:, -1].float(), rollout.samples.levels[last], rollout.samples.conditioning)
    with torch.no_grad():
        reached = trajectory.steps[last].mean(at[0], policy.predict(*at, adapter="old").output)
    off = (rollout.x0 - reached).std()
    torch.testing.assert_close(off, trajectory.steps.std[-1], rtol=0.1, atol=1e-5)


def test_recomputed_with_unchanged_weights_the_ratio_is_one(policy, rollout):
    loss, _ = visit_loss(policy, rollout, every_visit(), PPO)
    torch.testing.assert_close(ratios(loss), torch.ones(IMAGES * (STEPS - 1)), rtol=0, atol=1e-5)
    assert (loss.const == 0).all()
    trajectory = rollout.samples.trajectory  # and the noise that was drawn is that of a normal distribution
    expected = -0.5 - trajectory.steps.std[:-1].log() - 0.9189385
    torch.testing.assert_close(trajectory.log_probs.mean(dim=0), expected, rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", sorted({*FAMILIES, *FURTHER, *LATER} - set(MODELS)))
def test_so_it_is_for_every_pipeline(name, tmp_path):
    policy = Policy.from_pretrained(str(build(name, tmp_path)), call=call_of(name), device="cpu")
    policy.add_adapters(rank=2, alpha=4, seed=0)
    loss, kl = visit_loss(policy, sampled(policy), every_visit(), penalised(1.0))
    torch.testing.assert_close(ratios(loss), torch.ones(IMAGES * (STEPS - 1)), rtol=0, atol=1e-5)
    assert (kl < 1e-6).all()


def test_the_same_however_images_are_batched(policy, rollout):
    for batch in (1, 2, 4):
        other = sampled(policy, batch)
        torch.testing.assert_close(other.x0, rollout.x0, rtol=1e-4, atol=1e-4)
        for name in ("latents", "log_probs"):
            found, expected = (getattr(each.samples.trajectory, name) for each in (other, rollout))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_sampled_to_keep_step_is_left_out(policy, rollout, monkeypatch):
    monkeypatch.setattr(policy, "in_step", True)
    trajectory = sampled(policy, prompts=4).samples.trajectory
    assert trajectory.log_probs.shape == (IMAGES, STEPS - 1)
    torch.testing.assert_close(trajectory.log_probs, rollout.samples.trajectory.log_probs, rtol=1e-4, atol=1e-4)


def test_memory_that_runs_short_on_the_way_spoils_no_trajectory(policy, rollout, monkeypatch):
    scheduler = policy._schedulers.made["sde"]
    step, seen = scheduler.step, []

    def limited(model_output, timestep, sample, generator=None, return_dict=True):
        seen.append(len(sample))
        if len(sample) > GROUP and len(seen) == 3:  # in the third step of the first call
            raise torch.OutOfMemoryError("out of memory")
        return step(model_output, timestep, sample, generator, return_dict)

    monkeypatch.setattr(type(scheduler), "step", staticmethod(limited))
    found = sampled(policy).samples.trajectory
    assert seen == [IMAGES] * 3 + [GROUP] * 2 * STEPS
    torch.testing.assert_close(found.latents, rollout.samples.trajectory.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_probs, rollout.samples.trajectory.log_probs, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    policy._most.clear()


def test_only_sde_notes_trajectories_and_only_while_watched(policy, rollout):
    assert sampled(policy, scheduler="own").samples.trajectory is None
    with pytest.raises(ValueError, match="ppo needs images sampled with scheduler sde"):
        visit_loss(policy, sampled(policy, scheduler="own"), every_visit(), PPO)
    policy.images(TEXTS, list(range(2)), steps=2, scheduler="sde")
    assert policy._schedulers.made["sde"].taken is None


# ---- losses on them ---------------------------------------------------------------------------------------


@pytest.fixture
def moved(policy):
    """The trained weights a little further on than those that sampled."""
    draw, before = torch.Generator().manual_seed(1), [p.detach().clone() for p in policy.parameters]
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    yield policy
    with torch.no_grad():
        for parameter, value in zip(policy.parameters, before, strict=True):
            parameter.copy_(value)


def test_the_loss_is_on_the_step_that_was_taken(moved, rollout):
    visits, samples = every_visit(), rollout.samples
    loss, kl = visit_loss(moved, rollout, visits, penalised(0.5))
    for n in (0, 7, 22):
        image, step = int(visits.images[n]), int(visits.steps[n])
        at = samples.trajectory.latents[image, step][None]
        to = samples.trajectory.latents[image, step + 1][None]
        where = (at, samples.levels[torch.tensor([step])], samples.conditioning[torch.tensor([image])])
        taken = samples.trajectory.steps[torch.tensor([step])]
        with torch.no_grad():
            outputs = [moved.predict(*where, adapter=adapter).output for adapter in ("default", "old", None)]
        theta, old, base = (taken.mean(at, output) for output in outputs)
        normal = [torch.distributions.Normal(mean, taken.std).log_prob(to).mean() for mean in (theta, old)]
        assert ratios(loss)[n].item() == pytest.approx((normal[0] - normal[1]).exp().item(), abs=1e-5)
        expected = (theta - base).square().mean() / (2 * taken.unit**2)
        assert kl[n].item() == pytest.approx(expected.item(), rel=1e-3)
    assert (ratios(loss) - 1).abs().mean() > 1e-4
    assert visit_loss(moved, rollout, visits, PPO)[1] is None


def test_visits_do_not_depend_on_their_neighbours(moved, rollout):
    plan = [plan_epoch(IMAGES, STEPS, timesteps=2, updates=1, micro_batch=m, seed=0, epoch=0)[0] for m in (12, 1)]
    loss, kl = visit_loss(moved, rollout, plan[0][0], penalised(0.5))
    for n, visits in enumerate(plan[1]):
        one, one_kl = visit_loss(moved, rollout, visits, penalised(0.5))
        torch.testing.assert_close(one.slope[0], loss.slope[n], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one_kl[0], kl[n], rtol=1e-3, atol=1e-6)


def test_clipping_is_the_settings(moved, rollout):
    visits = every_visit()
    advantages = torch.tensor([7.0, -7.0]).expand(len(visits), 2)
    for clip in (1e-4, 10.0):
        loss, _ = visit_loss(moved, rollout, visits, PPO.model_copy(update={"clip": clip, "amax": 3.0}))
        ratio = ratios(loss)
        expected = torch.stack([3.0 * (ratio <= 1 + clip), -3.0 * (ratio >= 1 - clip)], dim=1)
        assert torch.equal(loss.effective(advantages), expected)
        assert (expected == 0).any() == (clip == 1e-4)


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_every_rewards_gradient_from_two_backward_passes(moved, rollout, kl):
    """Also where the part that no advantage enters is a constant 0, and without a gradient of its own."""
    advantages = torch.randn(IMAGES * (STEPS - 1), 4, generator=torch.Generator().manual_seed(2))
    with PerRewardGradients(moved.denoiser, parameters=moved.parameters) as engine:
        loss, divergence = visit_loss(moved, rollout, every_visit(), penalised(kl))
        if divergence is not None:
            loss = replace(loss, const=loss.const + kl * divergence)
        assert loss.const.requires_grad == (kl > 0)
        rows = engine.compute(loss, advantages)
    expected = reference_gradients(loss, advantages, moved.parameters)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-5 * expected.norm().item())
    assert (rows.norm(dim=1) > 0).all()


def test_where_it_breaks_is_found_on_the_trajectory(policy, rollout):
    visits = every_visit()
    assert "every layer's answer is finite" in where_broken(policy, rollout, visits, PPO)
    with torch.no_grad():
        policy.parameters[0][0, 0] = torch.nan
    assert "with the default weights" in where_broken(policy, rollout, visits, PPO)
    policy.copy_adapter("old", "default")


# ---- by hand ----------------------------------------------------------------------------------------------


class Linear:
    """A policy whose output is a multiple of what it is given."""

    def __init__(self, slope):
        self.slope = torch.tensor(slope, dtype=torch.float64, requires_grad=True)

    def predict(self, x_t, levels, conditioning, adapter):
        assert adapter == "default"  # neither the old policy nor, without a penalty, the base is asked
        output = self.slope * x_t
        return Prediction(levels.clean(x_t, output), output)


class Texts:
    """No conditioning at all."""

    def __getitem__(self, images):
        return self

    def expanded(self):
        return self


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """`−A · grad log p`, which for `output = w x` is `−A · mean (x' − mean) · gain · x / std²`."""
    sigmas = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    levels = NoiseLevels(1 - sigmas, sigmas, sigmas, "flow_prediction")
    steps = transitions_of(levels, (1.0, 0.0))
    x = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, visits = Linear(0.4), Visits(torch.tensor([3, 0, 2]), torch.tensor([1, 0, 1]), (1, 2, 3))
    at, to, taken = x[visits.images, visits.steps], x[visits.images, visits.steps + 1], steps[visits.steps]
    log_probs = torch.zeros(4, 2, dtype=torch.float64)
    with torch.no_grad():
        log_probs[visits.images, visits.steps] = taken.log_prob(to, taken.mean(at, policy.slope * at))
    samples = SimpleNamespace(
        x0=x[:, 0], levels=levels, conditioning=Texts(), trajectory=Trajectory(x, log_probs, steps)
    )
    advantage = torch.tensor([2.0, -1.0, 9.0], dtype=torch.float64)  # the last is clipped to 5
    loss, _ = visit_loss(policy, SimpleNamespace(samples=samples), visits, PPO)
    (found,) = torch.autograd.grad(loss.at(advantage).sum(), policy.slope)
    expected = 0.0
    for n, clipped in enumerate((2.0, -1.0, 5.0)):
        keep, gain, std = (each[n].item() for each in (taken.keep, taken.gain, taken.std))
        surprise = to[n] - (keep + gain * 0.4) * at[n]
        expected -= clipped * (surprise * gain * at[n]).mean().item() / std**2
    assert found.item() == pytest.approx(expected, rel=1e-6)
