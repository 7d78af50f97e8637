"""Calls of a pipeline, in halves where memory is short, and by one set of arguments."""

import inspect
import itertools
import logging
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marble import MarbleError, Policy
from marble.policy.sampling import Caller, Job, images_of, in_pieces, jobs

from ..pipelines import build, call_of

CPU = torch.device("cpu")
SIZES = {"prompts": st.integers(1, 6), "group": st.integers(1, 7), "batch": st.integers(1, 30)}


def images_in(job):
    """Which images a job makes, as (prompt, number)."""
    return [(p, i) for p in range(job.start, job.stop) for i in range(job.first, job.first + job.each)]


def in_order(made):
    return [image for job in made for image in images_in(job)]


def all_images(prompts, group):
    return [(p, i) for p in range(prompts) for i in range(group)]


@given(**SIZES)
def test_jobs_make_every_image_once_and_in_order(prompts, group, batch):
    made = list(jobs(prompts, group, batch))
    assert in_order(made) == all_images(prompts, group)
    assert all(1 <= len(job) <= max(batch, 1) for job in made)
    assert all(len(images_in(job)) == len(job) for job in made)
    if group <= batch:
        assert all(job.each == group for job in made)  # whole groups, so that each text is encoded once
        assert len(made) == -(-prompts // (batch // group))


def test_jobs_by_hand():
    assert list(jobs(3, 4, 8)) == [Job(0, 2, 0, 4), Job(2, 3, 0, 4)]
    assert list(jobs(2, 5, 2)) == [
        Job(p, p + 1, first, each) for p in (0, 1) for first, each in ((0, 2), (2, 2), (4, 1))
    ]


@given(start=st.integers(0, 3), count=st.integers(1, 5), first=st.integers(0, 3), each=st.integers(1, 6))
def test_halves_make_the_same_images_in_the_same_order(start, count, first, each):
    job = Job(start, start + count, first, each)
    if len(job) == 1:
        return
    halves = job.halves()
    assert in_order(halves) == images_in(job)
    assert all(0 < len(half) < len(job) for half in halves)


@given(start=st.integers(0, 2), count=st.integers(1, 3), first=st.integers(0, 2), each=st.integers(1, 3))
def test_an_image_has_its_own_seed_whatever_call_it_is_in(start, count, first, each):
    prompts, group = 5, 5
    seeds = [100 + n for n in range(prompts * group)]
    job = Job(start, start + count, first, each)
    assert job.seeds(seeds, group) == [100 + p * group + i for p, i in images_in(job)]


@given(**SIZES, fits=st.integers(1, 12))
def test_pieces_are_the_same_images_in_the_same_order_however_little_fits(prompts, group, batch, fits):
    tried = []

    def work(job):
        tried.append(len(job))
        if len(job) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images_in(job)

    with patch("marble.policy.sampling.forget"):  # collecting garbage is all that takes time here
        made = list(in_pieces(list(jobs(prompts, group, batch)), work, CPU))
    assert [image for part in made for image in part] == all_images(prompts, group)
    failed = [size for size in tried if size > fits]
    assert all(later <= (earlier + 1) // 2 for earlier, later in itertools.pairwise(failed))


def test_pieces_by_hand(caplog):
    """12 images do not fit, nor 4: then 2 at a time, also in the jobs that follow."""
    tried = []

    def work(job):
        tried.append(len(job))
        if len(job) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return len(job)

    with caplog.at_level(logging.WARNING, logger="marble"):
        made = list(in_pieces([Job(0, 3, 0, 4), Job(3, 6, 0, 4)], work, CPU))
    assert tried == [12, 4, *[2] * 12]  # 12 are a prompt and two; the first of them does not fit either
    assert made == [2] * 12
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "out of memory while making 12 images at once; going on with at most 6 (rollout.batch)",
        "out of memory while making 4 images at once; going on with at most 2 (rollout.batch)",
    ]


def test_a_single_image_that_does_not_fit():
    def work(job):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MarbleError, match=r"out of memory while making a single image: .*model\.call.*model\.quantize"):
        list(in_pieces([Job(0, 2, 0, 3)], work, CPU))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("out of memory")])
def test_other_errors_pass(error):
    def work(job):
        raise error

    with pytest.raises(type(error)) as caught:
        list(in_pieces([Job(0, 2, 0, 3)], work, CPU))
    assert caught.value is error


# ---- through real pipelines -----------------------------------------------------------------------------


TEXTS = ["a cat", "two dogs on a mat", "it"]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def policy(name):
        if name not in made:
            folder = build(name, tmp_path_factory.mktemp(name))
            made[name] = Policy.from_pretrained(str(folder), call=call_of(name), device="cpu")
        return made[name]

    return policy


def short_of_memory(policy, most, monkeypatch, message="CUDA out of memory. Tried to allocate 20.00 MiB"):
    """From now on the denoiser takes no more than `most` images; returns how many it was given each time."""
    policy._most.clear()  # what other tests found out
    policy.learn()
    forward, seen = policy.denoiser.forward, []

    def limited(*args, **kwargs):
        latents = args[0] if args else kwargs.get("hidden_states")
        seen.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError(message)
        return forward(*args, **kwargs)

    limited.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(policy.denoiser, "forward", limited)
    return seen


@pytest.mark.parametrize(("name", "most"), [("sd3", 1), ("sd3", 5), ("sana", 3), ("qwenimage", 2)])
def test_little_memory_makes_the_same_images(policies, name, most, monkeypatch, caplog):
    policy, seeds = policies(name), list(range(12))
    expected = policy.sample(TEXTS, seeds, steps=3)
    seen = short_of_memory(policy, most, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="marble"):
        found = policy.sample(TEXTS, seeds, steps=3)
    assert max(seen) == 12
    assert "out of memory while making 12 images at once; going on with at most 6" in caplog.text
    torch.testing.assert_close(found.x0, expected.x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.images, expected.images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.levels.sigmas, expected.levels.sigmas)
    # and what they are trained with: each image's text, at its own level
    at = expected.levels[torch.arange(12) % 3]
    one = torch.cat(
        [
            policy.predict(found.x0[n : n + 1], at[torch.tensor([n])], found.conditioning[torch.tensor([n])], None).x0
            for n in range(12)
        ]
    )
    monkeypatch.undo()
    torch.testing.assert_close(
        one.detach(), policy.predict(expected.x0, at, expected.conditioning, None).x0.detach(), atol=1e-3, rtol=1e-3
    )
    assert "step" not in vars(policy.pipe.scheduler)


def test_images_alone_with_little_memory(policies, monkeypatch):
    policy = policies("sd3")
    expected = policy.images(TEXTS, list(range(6)), steps=2)
    short_of_memory(policy, 2, monkeypatch)
    torch.testing.assert_close(policy.images(TEXTS, list(range(6)), steps=2), expected, atol=1e-5, rtol=1e-4)


def test_no_memory_for_one_image(policies, monkeypatch):
    policy = policies("sd3")
    short_of_memory(policy, 0, monkeypatch)
    with pytest.raises(MarbleError, match="out of memory while making a single image"):
        policy.sample(TEXTS, list(range(6)), steps=2)
    monkeypatch.undo()
    assert policy.sample(TEXTS, list(range(6)), steps=2).x0.isfinite().all()  # nothing is left behind


@pytest.mark.parametrize("advice", ["max_split_size_mb", "expandable_segments", "tensor shape"])
def test_what_an_error_advises_does_not_hide_that_memory_is_short(policies, advice, monkeypatch):
    """Torch's own advice names the allocator's setting `max_split_size_mb`: no complaint about an image's size."""
    policy = policies("sd3")
    short_of_memory(policy, 2, monkeypatch, f"CUDA out of memory. Try setting {advice} to avoid fragmentation")
    assert len(policy.sample(TEXTS, list(range(6)), steps=2).x0) == 6


def test_memory_that_does_not_suffice_for_watching(tmp_path, monkeypatch):
    """The two short calls make more than one image: with little memory they must not end in a traceback."""
    policy = Policy.from_pretrained(str(build("sd3", tmp_path)), call=call_of("sd3"), device="cpu")
    forward = policy.denoiser.forward

    def limited(hidden_states, *args, **kwargs):
        if len(hidden_states) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(policy.denoiser, "forward", limited)
    with pytest.raises(MarbleError, match="memory"):
        policy.sample(["a cat"], [1], steps=2)


# ---- arguments ------------------------------------------------------------------------------------------


def test_unknown_arguments_are_refused_with_the_nearest(policies):
    policy = policies("sd3")
    with pytest.raises(MarbleError, match=r'model\.call: .*Pipeline takes no heigth\. Did you mean "height"\?'):
        Caller(policy.pipe, {"heigth": 32}, policy.part)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwenimage", {"true_cfg_scale": 2.0}),
        ("sd3", {"return_dict": False}),
    ],
)
def test_arguments_that_clash_with_those_of_every_call(policies, name, call):
    with pytest.raises(MarbleError, match=next(iter(call))):
        Policy(policies(name).pipe, call_of(name) | call).sample(TEXTS, [1, 2, 3], steps=2)


@pytest.mark.parametrize(
    ("name", "scale", "arguments"),
    [
        ("sd3", 1.0, {"guidance_scale": 1.0}),
        ("sd3", 4.5, {"guidance_scale": 4.5}),
        ("flux", 3.5, {"guidance_scale": 3.5}),  # distilled: the scale is told
        ("qwenimage", 1.0, {"true_cfg_scale": 1.0, "negative_prompt": None}),
        ("qwenimage", 4.0, {"true_cfg_scale": 4.0, "negative_prompt": ""}),
        ("zimage", 1.0, {"guidance_scale": 0.0}),
        ("zimage", 5.0, {"guidance_scale": 4.0}),
    ],
)
def test_guidance_by_each_pipelines_own_word(policies, name, scale, arguments):
    assert policies(name).caller.guided(scale) == arguments


def test_a_pipeline_without_guidance():
    class Plain:
        transformer = torch.nn.Linear(1, 1)
        transformer.config = None

        def __call__(self, prompt, num_inference_steps, generator):
            raise AssertionError

    caller = Caller(Plain(), {}, "transformer")
    assert caller.guided(1.0) == {}
    with pytest.raises(MarbleError, match=r"guidance: Plain knows none, got 3\.0; use 1"):
        caller.guided(3.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", {"height": 33}, "StableDiffusionPipeline refuses: `height` and `width` have to be divisible by 8"),
        ("sd3", {"height": 33}, "StableDiffusion3Pipeline refuses: `height` and `width` have to be divisible by 8"),
        ("sd3", {"height": 128, "width": 128}, "StableDiffusion3Pipeline"),  # larger than its grid of positions
        ("sd3", {"max_sequence_length": 4096}, "StableDiffusion3Pipeline refuses: `max_sequence_length` cannot be"),
    ],
)
def test_what_the_model_refuses(policies, name, change, message):
    policy = policies(name)
    policy.learn()
    with pytest.raises(MarbleError) as caught:
        policy.sample(["a cat"], [1], steps=2, **change)
    assert message in str(caught.value)
    assert policy.sample(["a cat"], [1], steps=2).x0.isfinite().all()


def test_images_of_every_kind_of_answer():
    class Answer:
        def __init__(self, **parts):
            vars(self).update(parts)

    picture, video = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 3, 4, 4)
    assert torch.equal(images_of(Answer(images=picture)), picture)
    assert torch.equal(images_of(Answer(images=list(picture))), picture)
    assert torch.equal(images_of(Answer(frames=video)), video)
    half = images_of(Answer(images=picture.to(torch.float16)))
    assert half.dtype == torch.float32
