"""The scheduler `sde`: against Diffusers' own steps, and what it notes of them."""

import diffusers
import pytest
import torch

from marble.noise import levels_of, make_scheduler, prediction_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False}
FLOWS = {
    "plain": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
STEPS = 6


def ddim(**options):
    return diffusers.DDIMScheduler(**{**DDIM, **options})


def network(x, step):
    return 0.3 * x.tanh() + 0.001 * step


def generators(count=3):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def run(scheduler, x, *, steps=STEPS, draw=None, **call):
    """Where a pipeline's loop ends."""
    scheduler.set_timesteps(steps, **call)
    for step in scheduler.timesteps:
        x = scheduler.step(network(x, step).to(x.dtype), step, x, generator=draw, return_dict=False)[0]
    return x


def latents(count=3, seed=9):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "trailing", "set_alpha_to_one": True}])
def test_with_the_same_noise_it_is_diffusers_ddim_with_eta_one(prediction, options):
    own, steps = ddim(prediction_type=prediction, **options), 5  # which divides 1000: Diffusers' steps lead to the next
    found = run(make_scheduler("sde", own), latents(), steps=steps, draw=generators())
    own.set_timesteps(steps)
    x, draw = latents(), generators()
    for step in own.timesteps:
        x = own.step(network(x, step), step, x, eta=1.0, generator=draw, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_without_noise_a_flow_takes_eulers_steps(name):
    own = FLOWS[name]()
    call = {"mu": 0.8} if name == "dynamic" else {}
    scheduler = make_scheduler("sde", own)
    scheduler.noise = 1e-6
    found = run(scheduler, latents(), draw=generators(), **call)
    torch.testing.assert_close(found, run(make_scheduler("euler", own), latents(), **call), rtol=1e-4, atol=1e-5)
    scheduler.noise = 0.7
    assert (run(scheduler, latents(), draw=generators(), **call) - found).abs().mean() > 0.1


def test_a_flow_with_inverted_sigmas_takes_them_too():
    own = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler = make_scheduler("sde", own)
    scheduler.noise = 1e-6
    found = run(scheduler, latents(), draw=generators())
    torch.testing.assert_close(found, run(own, latents()), rtol=1e-4, atol=1e-5)
    assert prediction_of(scheduler) == "reversed_flow_prediction"


@pytest.mark.parametrize("own", [ddim(), FLOWS["plain"]()], ids=["ddim", "flow"])
def test_an_images_noise_is_its_own(own):
    scheduler = make_scheduler("sde", own)
    together = run(scheduler, latents(), draw=generators())
    for n in range(3):
        alone = run(scheduler, latents()[n : n + 1], draw=[generators()[n]])
        torch.testing.assert_close(alone, together[n : n + 1])
    assert (together[0] - together[1]).abs().mean() > 0.1


@pytest.mark.parametrize("own", [ddim(), FLOWS["plain"]()], ids=["ddim", "flow"])
def test_images_of_known_latents_keep_their_variance(own):
    """Clean latents of N(0, 0.5²), a network that knows, and the scheduler's own draws."""
    scheduler, spread = make_scheduler("sde", own), 0.5
    scheduler.set_timesteps(500)
    levels = levels_of(scheduler, scheduler.timesteps, scheduler.timesteps)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20_000, generator=draw)
    for t, step in enumerate(scheduler.timesteps):
        alpha, sigma = levels.alphas[t], levels.sigmas[t]
        variance = alpha**2 * spread**2 + sigma**2
        x0, noise = alpha * spread**2 / variance * x, sigma / variance * x
        output = noise if levels.prediction == "epsilon" else noise - x0
        x = scheduler.step(output, step, x, generator=draw).prev_sample
    assert x.std().item() == pytest.approx(spread, rel=0.025)  # chance: 0.5%


@pytest.mark.parametrize("own", [ddim(), FLOWS["plain"]()], ids=["ddim", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_notes_latents_and_the_log_probability_of_what_was_handed_on(own, dtype):
    scheduler = make_scheduler("sde", own)
    scheduler.taken = taken = []
    last = run(scheduler, latents().to(dtype), draw=generators())
    assert last.dtype == dtype
    assert len(taken) == STEPS
    after = [x for x, _ in taken[1:]] + [last]
    for t, (x, log_prob) in enumerate(taken[:-1]):
        assert x.dtype == dtype
        step = scheduler.transitions[torch.tensor([t])]
        output = network(x, scheduler.timesteps[t]).to(dtype)
        normal = torch.distributions.Normal(step.mean(x.float(), output.float()), step.std.item())
        by_torch = normal.log_prob(after[t].float()).mean(dim=(1, 2, 3))  # of the rounded latents, in half precision
        torch.testing.assert_close(log_prob, by_torch, rtol=1e-5, atol=1e-5)
    assert taken[-1][1].isnan().all()  # the last step is not trained


def test_every_call_begins_anew():
    scheduler = make_scheduler("sde", FLOWS["plain"]())
    first = run(scheduler, latents(), draw=generators())
    scheduler.set_timesteps(STEPS)
    scheduler.step(latents(), scheduler.timesteps[0], latents(), generator=generators())  # broken off
    torch.testing.assert_close(run(scheduler, latents(), draw=generators()), first, rtol=0, atol=0)
    run(scheduler, latents(), steps=4, draw=generators())
    assert len(scheduler.transitions.std) == 4


def test_a_first_level_just_below_one_is_no_explosion():
    scheduler = make_scheduler("sde", diffusers.FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(sigmas=[0.9999, 0.8, 0.5, 0.2])
    scheduler.step(latents(), scheduler.timesteps[0], latents(), generator=generators())
    exact = make_scheduler("sde", diffusers.FlowMatchEulerDiscreteScheduler())
    exact.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2])
    exact.step(latents(), exact.timesteps[0], latents(), generator=generators())
    torch.testing.assert_close(scheduler.transitions.keep, exact.transitions.keep, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scheduler.transitions.std, exact.transitions.std, rtol=1e-3, atol=1e-3)
