"""Noise levels against the formulas, for one scheduler after the other, and what outputs say of clean latents."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marble import MarbleError, Policy
from marble.noise import PREDICTIONS, NoiseLevels, levels_of, make_scheduler, prediction_of

from ..pipelines import build, call_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LEADING = {**BETAS, "timestep_spacing": "leading"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False}
STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # DEIS gives a tensor to numpy


def made(name, **options):
    return getattr(diffusers, name)(**options)


def levels_after(scheduler, stop=3, **call):
    """The levels of a scheduler that was used and stopped on its way; and the steps, as pipelines see them."""
    scheduler.set_timesteps(**({"num_inference_steps": STEPS} if "sigmas" not in call else {}), **call)
    x = torch.full((1, 1), 0.5)
    for step in scheduler.timesteps[:stop]:
        given = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(0.1 * given, step, x).prev_sample
    return levels_of(scheduler, scheduler.timesteps, scheduler.timesteps.float())


# ---- the levels of a sampler ----------------------------------------------------------------------------


def from_table(steps):
    """`sqrt(abar)` and `sqrt(1 − abar)` of whole timesteps, abar by its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[steps.long()]
    return abar.sqrt(), (1 - abar).sqrt()


BY_TABLE = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", BY_TABLE)
def test_levels_of_whole_timesteps_are_those_of_the_table(name, prediction):
    levels = levels_after(made(name, **LEADING, prediction_type=prediction, **BY_TABLE[name]))
    alphas, sigmas = from_table(levels.timesteps)
    torch.testing.assert_close(levels.alphas.double(), alphas, atol=1e-5, rtol=0)
    torch.testing.assert_close(levels.sigmas.double(), sigmas, atol=1e-5, rtol=0)
    assert levels.prediction == prediction
    assert len(levels) == {"PNDMScheduler": STEPS + 1, "HeunDiscreteScheduler": 2 * STEPS - 1}.get(name, STEPS)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_levels_between_whole_timesteps_are_those_of_the_sampler(name):
    """Karras' levels lie between the table's: `1 / sqrt(s² + 1)` and `s / sqrt(s² + 1)` of the ratio s."""
    scheduler = made(name, **BETAS, use_karras_sigmas=True)
    levels = levels_after(scheduler)
    ratio = levels.sigmas / levels.alphas
    s = scheduler.sigmas[:STEPS].float()
    expected = (1 / (s.square() + 1).sqrt(), s / (s.square() + 1).sqrt())
    torch.testing.assert_close(levels.alphas, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(levels.sigmas, expected[1], atol=1e-5, rtol=1e-5)
    # Karras et al. (2022): a power of 1/7 goes down evenly
    roots = ratio.double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(STEPS - 1) / (STEPS - 1), atol=1e-3, rtol=0)


QUARTERS = [1.0, 0.75, 0.5, 0.25]
THREE = [1.0, 0.9, 0.75, 0.5]  # 3 u / (1 + 2 u)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": math.log(3)}),  # e^mu / (e^mu + 1/u − 1)
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 3.0}),
    ],
    ids=["fixed", "dynamic", "dynamic, linear"],
)
def test_levels_of_a_flow_with_a_shift(options, call):
    levels = levels_after(made("FlowMatchEulerDiscreteScheduler", **options), sigmas=QUARTERS, **call)
    torch.testing.assert_close(levels.sigmas, torch.tensor(THREE))
    torch.testing.assert_close(levels.alphas, 1 - torch.tensor(THREE))
    torch.testing.assert_close(levels.timesteps, 1000 * torch.tensor(THREE))
    assert levels.prediction == "flow_prediction"


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_of_dpm_on_a_flow(shift):
    """Its own u go evenly from 0.999, and timesteps are rounded down: levels are exact all the same."""
    levels = levels_after(made("DPMSolverMultistepScheduler", **FLOW, flow_shift=shift))
    u = 0.999 * (1 - torch.arange(STEPS, dtype=torch.float64) / STEPS)
    sigmas = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(levels.sigmas.double(), sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(levels.alphas.double(), 1 - sigmas, atol=1e-6, rtol=0)
    assert torch.equal(levels.timesteps, (1000 * sigmas).floor().float())


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_levels_of_other_solvers_on_a_flow(name):
    scheduler = made(name, **FLOW, flow_shift=3.0)
    levels = levels_after(scheduler)
    torch.testing.assert_close(levels.sigmas, scheduler.sigmas[:STEPS].float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(levels.alphas + levels.sigmas, torch.ones(STEPS), atol=1e-6, rtol=0)
    assert (levels.sigmas.diff() < 0).all()


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler"])
def test_asking_for_levels_neither_depends_on_nor_changes_where_the_sampler_is(name, stop):
    scheduler = made(name, **LEADING)
    expected = levels_after(made(name, **LEADING), stop=3)
    found = levels_after(scheduler, stop=stop)
    assert torch.equal(found.sigmas, expected.sigmas)
    assert torch.equal(found.alphas, expected.alphas)
    assert scheduler.step_index == (stop or None)


def test_levels_at_some_of_the_steps():
    levels = levels_after(made("DDIMScheduler", **DDIM))
    some = levels[torch.tensor([3, 0, 3])]
    for field in ("alphas", "sigmas", "timesteps"):
        assert getattr(some, field).tolist() == [getattr(levels, field)[i].item() for i in (3, 0, 3)]
    assert some.prediction == "epsilon"
    assert len(some) == 3


# ---- what is refused ------------------------------------------------------------------------------------


def test_a_scheduler_in_another_space_is_refused_with_what_was_seen():
    """EDM gives its network inputs of another variance than training would."""
    with pytest.raises(MarbleError) as caught:
        levels_after(made("EDMEulerScheduler"))
    text = str(caught.value)
    assert "EDMEulerScheduler cannot be trained with" in text
    assert "alpha² + sigma² must be 1" in text
    assert "saw 1.000 to" in text
    assert "rollout.scheduler: dpm++, euler, ddim" in text


def test_predicted_noise_at_pure_noise_is_refused():
    options = {**DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(MarbleError, match=r"DDIMScheduler cannot be trained with: .* pure noise .* should predict v"):
        levels_after(made("DDIMScheduler", **options), stop=0)
    levels = levels_after(made("DDIMScheduler", **options, prediction_type="v_prediction"))
    assert levels.alphas[0] == 0
    assert levels.sigmas[0] == 1
    assert levels.gains.isfinite().all()


def test_an_unknown_prediction_is_refused():
    scheduler = SimpleNamespace(config={"prediction_type": "score"})
    with pytest.raises(MarbleError, match="says that the model predicts 'score'; known: flow_prediction, epsilon"):
        prediction_of(scheduler)
    with pytest.raises(MarbleError, match="predicts None"):
        prediction_of(SimpleNamespace(config={}))


# ---- what an output says --------------------------------------------------------------------------------


def at(prediction, angle, count=3):
    """Levels at one angle between data (0) and noise (π/2)."""
    sigma = math.sin(angle)
    alpha = 1 - sigma if prediction == "flow_prediction" else math.cos(angle)
    alphas, sigmas = (torch.full((count,), level, dtype=torch.float64) for level in (alpha, sigma))
    return NoiseLevels(alphas, sigmas, 1000 * sigmas, prediction)


def true_output(levels, x0, noise):
    alpha, sigma = levels.alphas[0], levels.sigmas[0]
    outputs = {"flow_prediction": noise - x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0}
    return outputs.get(levels.prediction, x0)


@given(prediction=st.sampled_from(PREDICTIONS), angle=st.floats(0.01, 1.5), seed=st.integers(0, 99))
def test_the_true_output_says_the_true_latents(prediction, angle, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise, other = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    levels = at(prediction, angle)
    x_t = levels.noised(x0, noise)
    torch.testing.assert_close(x_t, levels.alphas[0] * x0 + levels.sigmas[0] * noise, atol=0, rtol=0)
    output = true_output(levels, x0, noise)
    torch.testing.assert_close(levels.clean(x_t, output), x0, atol=1e-12, rtol=0)
    # affine in the output, by `gains`
    moved = levels.clean(x_t, output + other) - levels.clean(x_t, output)
    torch.testing.assert_close(moved.abs(), levels.gains[0] * other.abs(), atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(levels.weights * levels.gains, levels.sigmas, atol=1e-12, rtol=0)


# alpha 0.6, sigma 0.8, x0 = 2 and noise = −1: x_t = 0.4, and the noise says (0.4 + 0.8) / 0.6 = 2;
# v = 0.6 · −1 − 0.8 · 2 = −2.2 says 0.6 · 0.4 + 0.8 · 2.2 = 2. On the flow, alpha 0.2: x_t = −0.4, v = −3, and
# −0.4 + 0.8 · 3 = 2.
@pytest.mark.parametrize(
    ("prediction", "alpha", "x_t", "output", "gain", "weight"),
    [
        ("epsilon", 0.6, 0.4, -1.0, 4 / 3, 0.6),
        ("v_prediction", 0.6, 0.4, -2.2, 0.8, 1.0),
        ("flow_prediction", 0.2, -0.4, -3.0, 0.8, 1.0),
        ("sample", 0.6, 0.4, 2.0, 1.0, 0.8),
    ],
)
def test_by_hand(prediction, alpha, x_t, output, gain, weight):
    levels = NoiseLevels(torch.tensor([alpha]), torch.tensor([0.8]), torch.tensor([500.0]), prediction)
    found = levels.noised(torch.tensor([[2.0]]), torch.tensor([[-1.0]]))
    assert found.item() == pytest.approx(x_t)
    assert levels.clean(found, torch.tensor([[output]])).item() == pytest.approx(2.0)
    assert levels.gains.item() == pytest.approx(gain)
    assert levels.weights.item() == pytest.approx(weight)


def test_every_image_has_its_own_level():
    levels = levels_after(made("DDIMScheduler", **DDIM))[torch.tensor([4, 0, 2])]
    x0, noise = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    each = [levels[torch.tensor([n])].noised(x0[n : n + 1], noise[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(levels.noised(x0, noise), torch.cat(each))


# ---- schedulers by name ---------------------------------------------------------------------------------


SPREAD = 0.5
FLOWS = {
    "euler's": lambda: made("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "unipc's": lambda: made("UniPCMultistepScheduler", **FLOW, flow_shift=3.0),
}


def ended(scheduler, steps):
    """Where a sampler ends with the best denoiser there is for data of variance `SPREAD²`, and where it should.

    That denoiser is linear, `x0_hat = alpha s² / (alpha² s² + sigma²) x_t`, and so the probability flow keeps
    `x_t / sqrt(alpha² s² + sigma²)`.
    """
    scheduler.set_timesteps(steps)
    levels = levels_of(scheduler, scheduler.timesteps, scheduler.timesteps)
    x = torch.ones(1, 1) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    spread = (levels.alphas.square() * SPREAD**2 + levels.sigmas.square()).sqrt()
    firsts = []
    for i, step in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
        firsts.append(given)
        at = levels[torch.tensor([i])]
        x0 = levels.alphas[i] * SPREAD**2 / spread[i] ** 2 * given
        noise = (given - levels.alphas[i] * x0) / levels.sigmas[i]
        x = scheduler.step(true_output(at, x0, noise), step, x).prev_sample
    return x.item(), (firsts[0] * SPREAD / spread[0]).item()


@pytest.mark.parametrize("name", ["own", "dpm++", "euler", "ddim"])
@pytest.mark.parametrize("own", ["epsilon", "v_prediction", "sample", *FLOWS])
def test_all_schedulers_follow_one_flow(own, name):
    """With more steps each comes nearer to the exact end: the same numbers mean the same to sampler and training."""
    if own in FLOWS and name == "ddim":
        return
    offs = []
    for steps in (20, 100):
        first = FLOWS[own]() if own in FLOWS else made("DDIMScheduler", **DDIM, prediction_type=own)
        found, expected = ended(make_scheduler(name, first), steps)
        assert expected == pytest.approx(SPREAD, rel=0.01)
        offs.append(abs(found - expected) / expected)
    assert offs[1] < 0.03
    assert offs[1] < max(0.5 * offs[0], 0.005)


@pytest.mark.parametrize("own", FLOWS)
def test_a_flows_shift_goes_with_it(own):
    """`3 u / (1 + 2 u)`, whichever word its scheduler has for the shift."""
    euler, dpm = (make_scheduler(name, FLOWS[own]()) for name in ("euler", "dpm++"))
    assert euler.config.shift == dpm.config.flow_shift == 3.0
    assert prediction_of(euler) == prediction_of(dpm) == "flow_prediction"
    dpm.set_timesteps(4)
    u = 0.999 * torch.tensor(QUARTERS)
    torch.testing.assert_close(dpm.sigmas[:4].float(), 3 * u / (1 + 2 * u), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dpm++", "euler", "ddim"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_noise_schedule_and_the_prediction_go_with_the_model(name, prediction):
    scheduler = make_scheduler(name, made("DDIMScheduler", **DDIM, prediction_type=prediction))
    assert prediction_of(scheduler) == prediction
    torch.testing.assert_close(
        scheduler.alphas_cumprod[[0, 499, 999]], from_table(torch.tensor([0, 499, 999]))[0].float() ** 2
    )


def test_own_is_untouched_and_the_rest_is_refused():
    flow = FLOWS["euler's"]()
    assert make_scheduler("own", flow) is flow
    for name in ("ddim", "heun"):
        with pytest.raises(MarbleError, match=rf'scheduler "{name}" is not for models that come with FlowMatchEuler'):
            make_scheduler(name, flow)
    linear = made("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, time_shift_type="linear")
    with pytest.raises(MarbleError, match=r"dpm\+\+ cannot shift its levels .* \(time_shift_type linear\); use own"):
        make_scheduler("dpm++", linear)


@pytest.mark.parametrize("name", ["qwenimage", "flux"])
def test_pipelines_that_hand_over_levels_sample_with_dpm(name, tmp_path):
    """They call `set_timesteps(sigmas=…, mu=…)`, which DPM-Solver++ does not know; the shift must still be theirs."""
    policy = Policy.from_pretrained(str(build(name, tmp_path)), call=call_of(name), device="cpu")
    own = policy.sample(["a cat"], [1], steps=60).x0
    near = [policy.sample(["a cat"], [1], steps=steps, scheduler="dpm++") for steps in (4, 60)]
    assert [len(each.levels) for each in near] == [4, 60]
    off = [((each.x0 - own).norm() / own.norm()).item() for each in near]
    assert off[1] < 0.5 * off[0]
    settings = policy._schedulers.made["own"].config
    # 16 tokens: the shift's exponent is far left on the line from base_image_seq_len to max_image_seq_len
    slope = (settings.max_shift - settings.base_shift) / (settings.max_image_seq_len - settings.base_image_seq_len)
    shift = math.exp(settings.base_shift + slope * (16 - settings.base_image_seq_len))
    u = 0.999 * torch.tensor(QUARTERS)
    torch.testing.assert_close(near[0].levels.sigmas, shift * u / (1 + (shift - 1) * u), atol=1e-5, rtol=0)
