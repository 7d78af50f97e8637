"""What pipelines did that were met later: images in another dim, flows upwards, noise drawn by schedulers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from marble import MarbleError
from marble.policy.sampling import Caller
from marble.watch import Conditioning, Watch

from .test_learn import Denoiser, Fake, learnt, refusal


class Layers(Denoiser):
    """Takes texts as `[layers, images, …]`, as HiDream does."""

    def forward(self, latents, t, text=None, layers=None):
        mixed = layers.mean(0) if layers is not None else text
        return super().forward(latents, t, mixed)


class InAnotherDim(Fake):
    def __init__(self):
        super().__init__()
        self.transformer = Layers()

    def denoise(self, x, t, text, step):
        return self.transformer(x, t, text=text, layers=torch.stack([text, 2 * text, 3 * text]))[0]


def test_entries_for_images_are_found_in_any_dim():
    pipe = InAnotherDim()
    manner = learnt(pipe)
    assert manner.per_image == {("text",), ("layers",)}
    assert manner.dims == {("layers",): 1}
    with Watch(pipe, "transformer") as watch:
        pipe(["a", "abcd"], 3, 2)
    conditioning = watch.seen(manner, 3).conditioning
    assert conditioning.rows.tolist() == [0, 0, 0, 1, 1, 1]
    latents, told = torch.zeros(2, 2, 3, 3), torch.zeros(2)
    answer = conditioning[torch.tensor([5, 0])].call(pipe.transformer, latents, told)
    torch.testing.assert_close(answer[:, 0, 0, 0], torch.tensor([8.0, 2.0]))  # 2 · the text's length


def test_what_is_kept_of_the_images_of_a_prompt_does_not_hang_on_rounding():
    arguments = {"latents": torch.zeros(4, 2), "t": torch.zeros(4), "text": torch.ones(4, 3)}
    arguments["text"][1] += 1e-7
    manner = learnt(Fake())
    assert len(Conditioning.of_call(manner, arguments, 4, 2).tables[0].per_prompt[("text",)]) == 2
    assert len(Conditioning.of_call(manner, arguments, 4).tables[0].per_prompt[("text",)]) == 3


class Stretching(FlowMatchEulerDiscreteScheduler):
    """Ends three times as far out as what it is told stands for."""

    def step(self, model_output, timestep, sample, return_dict=True):
        return (3 * super().step(model_output, timestep, sample, return_dict=False)[0],)


def test_a_scheduler_that_ends_elsewhere_is_refused():
    class Elsewhere(Fake):
        def __init__(self):
            super().__init__()
            self.scheduler = Stretching()

    assert "stands for clean latents that are 0.67 of their length from where Stretching ends" in refusal(Elsewhere)


def test_levels_of_a_flow_whose_sigmas_are_inverted():
    from marble.noise import levels_of, make_scheduler, prediction_of

    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    levels = levels_of(scheduler, scheduler.timesteps, scheduler.timesteps)
    assert prediction_of(scheduler) == "reversed_flow_prediction"
    assert (levels.sigmas[1:] < levels.sigmas[:-1]).all()
    at = levels[torch.tensor([0, 2])]
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(at.clean(at.noised(x0, noise), x0 - noise), x0, atol=1e-6, rtol=0)
    with pytest.raises(MarbleError, match=r"dpm\+\+ cannot count levels upwards"):
        make_scheduler("dpm++", scheduler)


class Guider:
    """A component that holds the guidance scale, as HunyuanImage's does."""

    guidance_scale, enabled = 7.5, True

    def disable(self):
        self.enabled = False

    def enable(self):
        self.enabled = True


class Guided(Fake):
    def __init__(self):
        super().__init__()
        self.components = {"guider": Guider(), "transformer": self.transformer}
        self.transformer.config = object()
        self.noises = []

    def __call__(self, prompt, num_inference_steps, generator, output_type="pt"):
        result = self.scheduler.step(0.0)
        self.noises.append(result)


def test_guiders_are_told_the_scale_and_noise_is_drawn_from_the_images_seeds():
    pipe = Guided()

    class Draws:
        def step(self, output, generator=None):
            assert generator is not None
            return torch.cat([torch.randn(1, generator=each) for each in generator])

    pipe.scheduler = Draws()
    caller = Caller(pipe, {}, "transformer")
    for guidance, enabled in ((1.0, False), (4.0, True)):
        caller(["a", "b"], 2, 3, guidance, [1, 2, 3, 4])
        assert pipe.components["guider"].enabled == enabled
        assert pipe.components["guider"].guidance_scale == guidance
    first, second = pipe.noises
    assert torch.equal(first, second)
    assert first[2] == torch.randn(1, generator=torch.Generator().manual_seed(3))
    assert "step" not in vars(pipe.scheduler)
