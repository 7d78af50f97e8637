"""What pipelines are learnt, and what is said of those that cannot be: fakes with one quirk each, then real ones."""

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from marble import MarbleError, Policy
from marble.policy.weights import denoiser_of
from marble.watch import Manner, Watch, learn

from ..pipelines import build, call_of


class Denoiser(nn.Module):
    """Answers `0.5 latents + text`, whatever else it is given."""

    def forward(self, latents, t, text=None, size=None, more=None, **others):
        latents = torch.stack(latents) if isinstance(latents, list) else latents
        text = text.mean(1).view(-1, *[1] * (latents.ndim - 1))
        return (0.5 * latents + text + 1e-4 * torch.as_tensor(t).reshape(-1)[0],)


class Fake:
    """A pipeline with one call of its denoiser a step; subclasses do it otherwise."""

    least_steps = 0

    def __init__(self):
        self.transformer = Denoiser()
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self, prompts, each, steps):
        count = each * len(prompts)
        text = torch.stack([torch.full((3,), float(len(p))) for p in prompts for _ in range(each)])
        x = torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            output = self.denoise(x, t.expand(count), text, step)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def denoise(self, x, t, text, step):
        return self.transformer(x, t, text=text, size=(3, 3))[0]


def learnt(pipe):
    return learn(pipe, "transformer", pipe)


def refusal(kind, error=MarbleError):
    with pytest.raises(error) as caught:
        learnt(kind())
    return str(caught.value)


def test_a_plain_pipeline():
    assert learnt(Fake()) == Manner(
        latent="latents",
        listed=False,
        ones=(),
        latent_dtype=torch.float32,
        timestep="t",
        timestep_dims=1,
        timestep_dtype=torch.float32,
        per_image=frozenset({("text",)}),
        sign=1,
    )


def test_quirks_that_can_be_learnt():
    class Listed(Fake):
        """A list of images with a frame each, a single timestep that runs backwards, a turned sign, nested masks."""

        def denoise(self, x, t, text, step):
            mask = None if len(text) == 2 else torch.ones(4, 3)
            more = {"mask": mask, "sizes": [(3, 3)] * len(x), "name": "same"}
            return -self.transformer(list(x[:, :, None]), 1000 - t[0], text, more=more)[0].squeeze(2)

    found = learnt(Listed())
    assert found.listed
    assert found.ones == (2,)
    assert found.timestep_dims == 0
    assert found.sign == -1
    assert found.per_image == {("text",), ("more", "mask"), ("more", "sizes")}

    class Tokens(Fake):
        """A timestep for every token, packed latents, prompts' texts and not images'."""

        def denoise(self, x, t, text, step):
            packed = x.flatten(2).to(torch.bfloat16)
            answer = self.transformer(packed, t[:, None].expand(-1, 9).to(torch.float64), text)[0]
            return answer.view(x.shape).to(x.dtype)

    found = learnt(Tokens())
    assert (found.timestep_dims, found.timestep_dtype, found.latent_dtype) == (2, torch.float64, torch.bfloat16)


def test_the_pipeline_is_left_as_it_was():
    pipe = Fake()
    learnt(pipe)
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks

    def broken(*_):
        raise RuntimeError("on its way")

    pipe.denoise = broken
    with pytest.raises(RuntimeError, match="on its way"):
        learnt(pipe)
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_pre_hooks


# ---- what is refused: the message has what was seen and what was expected ----------------------------------


def test_two_calls_a_step():
    class Twice(Fake):
        def denoise(self, x, t, text, step):
            return 2 * super().denoise(x, t, text, step) - super().denoise(x, t, 0 * text, step)

    text = refusal(Twice)
    assert "Twice cannot be watched: expected one call of transformer for every scheduler.step, saw 4 and 2" in text
    assert "guidance" in text


def test_no_call_at_all():
    class Never(Fake):
        def denoise(self, x, t, text, step):
            return 0.5 * x

    assert "expected one call of transformer for every scheduler.step, saw 0 and 2" in refusal(Never)


def test_no_scheduler_step():
    class Own(Fake):
        def __call__(self, prompts, each, steps):
            x = torch.randn(each * len(prompts), 2, 3, 3)
            for t in torch.linspace(1, 0.5, steps):
                x = x - 0.1 * self.denoise(x, t.expand(len(x)), torch.ones(len(x), 3), 0)

    assert "saw 2 and 0" in refusal(Own)


def test_every_image_twice():
    class Doubled(Fake):
        def denoise(self, x, t, text, step):
            both = super().denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([0 * text, text]), step)
            without, wanted = both.chunk(2)
            return without + 4 * (wanted - without)

    text = refusal(Doubled)
    assert "expected one argument of transformer that is the scheduler's sample [2, 2, 3, 3], found none" in text
    assert "latents [4, 2, 3, 3], t [4], text [4, 3]" in text
    assert "latents holds every image twice: is that classifier-free guidance?" in text
    assert "set rollout.guidance to 1" in text


def test_latents_that_are_not_the_samples():
    class Mixed(Fake):
        def denoise(self, x, t, text, step):
            return super().denoise(x + 0.5 * x.flip(-1), t, text, step)

    text = refusal(Mixed)
    assert "found none among latents [2, 2, 3, 3]" in text
    assert "guidance" not in text


def test_two_arguments_that_are_latents():
    class Both(Fake):
        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text, more=2 * x)[0]

    assert "found latents, more among" in refusal(Both)


@pytest.mark.parametrize("told", [lambda t: float(t[0]), lambda t: 0 * t, lambda t: t + torch.arange(len(t))])
def test_no_timestep(told):
    class Untold(Fake):
        def denoise(self, x, t, text, step):
            return self.transformer(x, told(t), text)[0]

    assert re.search(
        r"expected one tensor among transformer's arguments .* changes from step to step, the timestep; found none "
        "among latents, t, text",
        refusal(Untold),
    )


def test_two_timesteps():
    class Two(Fake):
        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text, more=t / 1000)[0]

    assert "the timestep; found t, more among latents, t, text, more" in refusal(Two)


@pytest.mark.parametrize("value", [lambda step: step, lambda step: {"at": [torch.tensor([step, 1])]}])
def test_another_argument_that_changes(value):
    class Changing(Fake):
        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text, more=value(step))[0]

    assert re.search(r"transformer's more(\.at\[0\])? changes from step to step", refusal(Changing))


def test_an_argument_that_goes():
    class Going(Fake):
        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text, **({} if step else {"more": [1]}))[0]

    assert "transformer's more" in refusal(Going)


def test_an_argument_that_comes():
    class Adding(Denoiser):
        def forward(self, latents, t, text=None, more=0):
            return (super().forward(latents, t, text)[0] + more,)

    class Coming(Fake):
        def __init__(self):
            super().__init__()
            self.transformer = Adding()

        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text, **({"more": 5} if step else {}))[0]

    assert "Coming cannot be watched" in refusal(Coming)


def test_an_output_that_the_scheduler_never_sees():
    class Blended(Fake):
        def denoise(self, x, t, text, step):
            return super().denoise(x, t, text, step) + 0.1 * x

    text = refusal(Blended)
    assert "what scheduler.step is given is neither what transformer answers nor its negative" in text
    assert "set rollout.guidance to 1" in text


def test_an_answer_of_another_shape():
    class Short(Fake):
        def denoise(self, x, t, text, step):
            answer = self.transformer(x[..., :2], t, text)[0]
            return torch.cat([answer, x[..., 2:]], dim=-1)

    assert "Short cannot be watched" in refusal(Short)

    class Cut(Denoiser):
        def forward(self, latents, t, text=None, size=None):
            return (super().forward(latents, t, text)[0][:, :, :2],)

    class Padded(Fake):
        def __init__(self):
            super().__init__()
            self.transformer = Cut()

        def denoise(self, x, t, text, step):
            return torch.cat([super().denoise(x, t, text, step), x[:, :, :1]], dim=2)

    assert "expected transformer to answer [2, 2, 3, 3], saw another" in refusal(Padded)


def test_an_answer_in_a_dict_of_ones_own():
    class Named(Denoiser):
        def forward(self, latents, t, text=None):
            return {"velocity": super().forward(latents, t, text)[0]}

    class InADict(Fake):
        def __init__(self):
            super().__init__()
            self.transformer = Named()

        def denoise(self, x, t, text, step):
            return self.transformer(x, t, text)["velocity"]

    assert learnt(InADict()).sign == 1


def test_a_denoiser_that_does_not_answer_the_same_twice():
    class Counting(Denoiser):
        calls = 0

        def forward(self, latents, t, text=None, size=None):
            self.calls += 1
            return (super().forward(latents, t, text)[0] + self.calls,)

    class Remembers(Fake):
        def __init__(self):
            super().__init__()
            self.transformer = Counting()

    assert re.search(
        r"a recorded call made again gives another answer \(off by \d\.\de[+-]\d\d of it\)", refusal(Remembers)
    )


def test_latents_of_another_number_of_images():
    class Single(Fake):
        def __call__(self, prompts, each, steps):
            return super().__call__(prompts, 1, steps)

    assert "expected latents of 2 images, saw [1, 2, 3, 3]" in refusal(Single)


def test_a_pipeline_that_makes_one_step_whatever_it_is_asked():
    class OneStep(Fake):
        def __call__(self, prompts, each, steps):
            return super().__call__(prompts, each, 1)

    text = refusal(OneStep)
    assert "OneStep cannot be watched" in text
    assert "step" in text


def test_two_denoisers_or_none():
    class Empty:
        def __init__(self):
            self.components = {"vae": nn.Linear(1, 1), "tokenizer": None}

    with pytest.raises(MarbleError, match="Empty has neither a transformer nor a unet to train; it has vae"):
        denoiser_of(Empty())
    pipe = Fake()
    assert denoiser_of(pipe) == "transformer"
    pipe.transformer_2 = Denoiser()
    with pytest.raises(MarbleError, match=r"Fake denoises with two networks \(transformer and transformer_2\)"):
        denoiser_of(pipe)
    del pipe.transformer_2, pipe.scheduler
    with pytest.raises(MarbleError, match="Fake has no scheduler"):
        denoiser_of(pipe)


def test_a_call_otherwise_than_when_it_was_watched():
    pipe = Fake()
    manner = learnt(pipe)

    class Doubled(Fake):
        def denoise(self, x, t, text, step):
            return super().denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text]), step).chunk(2)[0]

    with Watch(Doubled(), "transformer") as watch:
        watch.pipe(["a"], 3, 2)
    with pytest.raises(
        MarbleError, match=r"Doubled called its transformer otherwise .* text has 6 entries for 3 images"
    ):
        watch.seen(manner)


# ---- real pipelines -------------------------------------------------------------------------------------


def real(name, folder):
    return Policy.from_pretrained(str(build(name, folder)), call=call_of(name), device="cpu")


@pytest.mark.parametrize("name", ["sd15", "sd3", "lumina2", "wan"])
def test_guidance_cannot_be_trained_with_but_looked_at(name, tmp_path):
    policy = real(name, tmp_path)
    with pytest.raises(MarbleError, match=r"cannot be watched: expected one .* guidance\? .* set rollout\.guidance"):
        policy.sample(["a cat"], [1, 2], steps=2, guidance=5.0)
    plain, guided = (policy.images(["a cat"], [1, 2], steps=2, guidance=scale) for scale in (1.0, 5.0))
    assert guided.shape == plain.shape
    assert not torch.allclose(guided, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "mixed"), [("sana", True), ("lumina2", True), ("qwenimage", True), ("sd3", False), ("flux", False)]
)
def test_prompts_that_a_pipeline_mixes_up_are_given_once_an_image(name, mixed, tmp_path):
    """Their masks are repeated in another order than their texts."""
    policy = real(name, tmp_path)
    texts = ["a cat", "two dogs on a mat by the sea", "it"]
    together = policy.sample(texts, list(range(6)), steps=3)
    assert policy.caller.repeats_texts == mixed
    alone = [policy.sample([text], [2 * i, 2 * i + 1], steps=3) for i, text in enumerate(texts)]
    torch.testing.assert_close(together.x0, torch.cat([each.x0 for each in alone]), atol=1e-4, rtol=1e-4)
    assert together.conditioning.rows.tolist() == [0, 0, 1, 1, 2, 2]
    policy.caller.repeats_texts = False
    with torch.no_grad():
        naive = policy.caller(texts, 2, 3, 1.0, range(6), output_type="latent").images
    assert torch.allclose(naive.reshape(together.x0.shape), together.x0, atol=1e-3) == (not mixed)
