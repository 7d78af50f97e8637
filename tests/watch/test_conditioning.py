"""What is kept of a pipeline's calls, and given to the denoiser again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from marble import Policy
from marble.config import Objective
from marble.objectives.visit import Visits, plan_epoch, visit_loss
from marble.rollout import Rollout
from marble.watch import Conditioning, Manner
from marble.watch.manner import as_sample

from ..pipelines import build, call_of

PLAIN = Manner(
    latent="x",
    listed=False,
    ones=(),
    latent_dtype=torch.float32,
    timestep="t",
    timestep_dims=1,
    timestep_dtype=torch.float32,
    per_image=frozenset({("text",), ("more", "mask"), ("sizes",)}),
    sign=1,
)


class Recorder(nn.Module):
    """Keeps what it is given and answers with a multiple of the latents."""

    def forward(self, **given):
        self.given = given
        latents = given["x"]
        return (3 * (torch.stack(latents) if isinstance(latents, list) else latents),)


def call_with(texts, *, each=2, mask=True, sizes=None):
    """A call's arguments for `each` images of every text (numbers from which to make them)."""
    count = each * len(texts)
    return {
        "x": torch.zeros(count, 2, 3),
        "t": torch.zeros(count),
        "text": torch.stack([torch.full((4, 2), float(text)) for text in texts for _ in range(each)]),
        "more": {"mask": torch.tensor([[text > 1] * 4 for text in texts for _ in range(each)]) if mask else None},
        "sizes": [torch.arange(text + 1) for text in texts for _ in range(each)] if sizes is None else sizes,
        "scale": 2.5,
    }


def given_for(conditioning, images):
    """What the denoiser is given for some of the images."""
    recorder = Recorder()
    chosen = conditioning[torch.tensor(images)]
    chosen.call(recorder, torch.zeros(len(images), 2, 3), torch.zeros(len(images)))
    return recorder.given


def test_of_a_call_a_row_is_kept_for_every_prompt():
    kept = Conditioning.of_call(PLAIN, call_with([1, 2, 5]), 6)
    assert kept.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert kept.table_of.tolist() == [0] * 6
    (table,) = kept.tables
    assert table.per_prompt[("text",)][:, 0, 0].tolist() == [1, 2, 5]
    assert table.per_prompt[("more", "mask")][:, 0].tolist() == [False, True, True]
    assert [len(size) for size in table.per_prompt[("sizes",)]] == [2, 3, 6]
    assert table.shared == {"text": None, "more": {"mask": None}, "sizes": None, "scale": 2.5}


def test_arguments_come_back_in_place():
    given = given_for(Conditioning.of_call(PLAIN, call_with([1, 2]), 4), [3, 0, 0])
    assert given["text"][:, 0, 0].tolist() == [2, 1, 1]
    assert given["more"]["mask"].shape == (3, 4)
    assert [len(size) for size in given["sizes"]] == [3, 2, 2]
    assert given["scale"] == 2.5
    assert given["t"].tolist() == [0, 0, 0]


def test_entries_of_prompts_are_spread_over_their_images():
    call = call_with([1, 2])
    call["text"] = call["text"][::2]
    kept = Conditioning.of_call(PLAIN, call, 4)
    assert kept.rows.tolist() == [0, 0, 1, 1]
    assert given_for(kept, [0, 1, 2, 3])["text"][:, 0, 0].tolist() == [1, 1, 2, 2]


def test_one_entry_for_all_images():
    call = call_with([4], each=3)
    call["text"] = call["text"][:1]
    kept = Conditioning.of_call(PLAIN, call, 3)
    assert kept.rows.tolist() == [0, 0, 0]
    assert given_for(kept, [2, 1])["text"].shape == (2, 4, 2)


def test_any_difference_makes_another_row():
    call = call_with([1, 1, 1, 1], each=1)
    assert Conditioning.of_call(PLAIN, call, 4).rows.tolist() == [0, 0, 0, 0]
    call["more"]["mask"][2, 3] = True
    assert Conditioning.of_call(PLAIN, call, 4).rows.tolist() == [0, 0, 1, 2]  # compared with neighbours alone
    call["sizes"][1] = torch.tensor([5])
    assert Conditioning.of_call(PLAIN, call, 4).rows.tolist() == [0, 1, 2, 3]


def test_nothing_that_is_kept_needs_a_gradient():
    call = call_with([1, 2])
    call["text"].requires_grad_(True)
    kept = Conditioning.of_call(PLAIN, call, 4)
    assert not kept.tables[0].per_prompt[("text",)].requires_grad


@pytest.mark.parametrize("entries", [0, 3, 8])
def test_entries_that_fit_no_images(entries):
    call = call_with([1, 2]) | {"sizes": [torch.zeros(1)] * entries}
    with pytest.raises(ValueError, match=f"sizes has {entries} entries for 4 images"):
        Conditioning.of_call(PLAIN, call, 4)


# ---- several calls --------------------------------------------------------------------------------------


def test_calls_of_other_shapes_get_tables_of_their_own():
    longer = call_with([7])
    longer["text"] = longer["text"].repeat(1, 2, 1)
    calls = [call_with([1, 2]), longer, call_with([3]), call_with([4], mask=False), call_with([5]) | {"scale": 1.0}]
    kept = Conditioning.join([Conditioning.of_call(PLAIN, call, len(call["t"])) for call in calls])
    assert kept.table_of.tolist() == [0] * 4 + [1] * 2 + [0] * 2 + [2] * 2 + [3] * 2
    assert kept.rows.tolist() == [0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 0, 0]
    assert kept.tables[0].per_prompt[("text",)][:, 0, 0].tolist() == [1, 2, 3]
    assert given_for(kept, [6, 0])["text"][:, 0, 0].tolist() == [3, 1]
    assert given_for(kept, [4])["text"].shape == (1, 8, 2)
    assert given_for(kept, [8, 9])["more"] == {"mask": None}
    assert given_for(kept, [10])["scale"] == 1.0


def test_another_dtype_is_another_table():
    calls = [call_with([1]), call_with([2])]
    calls[1]["text"] = calls[1]["text"].double()
    kept = Conditioning.join([Conditioning.of_call(PLAIN, call, 2) for call in calls])
    assert kept.table_of.tolist() == [0, 0, 1, 1]


@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    masks=st.lists(st.booleans(), min_size=4, max_size=4),
    each=st.integers(1, 3),
    data=st.data(),
)
def test_every_image_gets_what_its_call_gave_it(lengths, masks, each, data):
    calls = [call_with(texts, each=each, mask=mask) for texts, mask in zip(lengths, masks, strict=False)]
    kept = Conditioning.join([Conditioning.of_call(PLAIN, call, len(call["t"])) for call in calls])
    texts = [text for call in lengths for text in call for _ in range(each)]
    assert len(kept.rows) == len(kept.table_of) == len(texts)
    table = data.draw(st.sampled_from(sorted(set(kept.table_of.tolist()))))
    images = data.draw(st.lists(st.sampled_from((kept.table_of == table).nonzero().flatten().tolist()), min_size=1))
    given = given_for(kept, images)
    assert given["text"][:, 0, 0].tolist() == [texts[i] for i in images]
    assert [len(size) - 1 for size in given["sizes"]] == [texts[i] for i in images]
    whole = kept[torch.tensor(images)].expanded()  # and once expanded, part of it
    assert given_for(whole, [len(images) - 1])["text"][0, 0, 0] == texts[images[-1]]


def test_images_of_several_tables_cannot_be_in_one_call():
    calls = [call_with([1]), call_with([2], mask=False)]
    kept = Conditioning.join([Conditioning.of_call(PLAIN, call, 2) for call in calls])
    with pytest.raises(ValueError, match="texts have different shapes"):
        kept.expanded()
    with pytest.raises(ValueError, match="texts have different shapes"):
        given_for(kept, [1, 2])


# ---- how latents and timesteps go in, and outputs come back ---------------------------------------------


def answer(manner, arguments=None, timesteps=(7.0, 8.0)):
    recorder, latents = Recorder(), torch.arange(12.0).reshape(2, 2, 3)
    output = manner.call(recorder, arguments or {}, latents, torch.tensor(timesteps))
    return recorder.given, latents, output


def test_latents_and_timesteps_go_in_as_the_pipeline_gave_them():
    given, latents, output = answer(replace(PLAIN, latent_dtype=torch.float16, timestep_dtype=torch.int64))
    assert given["x"].dtype == torch.float16
    assert given["t"].tolist() == [7, 8]
    assert given["t"].dtype == torch.int64
    assert output.dtype == torch.float32
    assert torch.equal(output, 3 * latents)


def test_a_turned_sign_a_list_and_dims_of_one():
    given, latents, output = answer(replace(PLAIN, listed=True, ones=(2,), sign=-1))
    assert [each.shape for each in given["x"]] == [(2, 1, 3)] * 2
    assert torch.equal(output, -3 * latents)
    given, _, _ = answer(replace(PLAIN, ones=(1, 3)))
    assert given["x"].shape == (2, 1, 2, 1, 3)


def test_a_timestep_for_every_token():
    given, _, _ = answer(replace(PLAIN, timestep_dims=2), {"t": torch.zeros(1, 5)})
    assert given["t"].tolist() == [[7.0] * 5, [8.0] * 5]


def test_a_timestep_for_every_token_is_kept_for_its_length():
    manner = replace(PLAIN, timestep_dims=2)
    kept = Conditioning.of_call(manner, call_with([1, 2]) | {"t": torch.full((4, 5), 9.0)}, 4)
    recorder = Recorder()
    kept[torch.tensor([2, 1])].call(recorder, torch.zeros(2, 2, 3), torch.tensor([7.0, 8.0]))
    assert recorder.given["t"].tolist() == [[7.0] * 5, [8.0] * 5]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"sample": x}, lambda x: list(x)])
def test_answers_of_every_wrapping(wrap):
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(as_sample(wrap(x), x), x)
    assert torch.equal(as_sample(wrap(x[:, :, None]), x), x)
    assert torch.equal(as_sample(wrap(torch.cat([x, x + 1], dim=1)), x), x)  # a learnt variance is cut off


def test_an_answer_of_diffusers_own_kind():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(as_sample(Transformer2DModelOutput(sample=x), x), x)


# ---- a pipeline whose texts are as long as they are ------------------------------------------------------


TEXTS = ["a cat", "two dogs on a mat", "a dog"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = build("qwenimage", tmp_path_factory.mktemp("qwenimage"))
    policy = Policy.from_pretrained(str(folder), call=call_of("qwenimage"), device="cpu")
    policy.add_adapters(rank=2, alpha=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for version, size in (("default", 0.3), ("old", 0.2)):
            for parameter in policy._slots[version]:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def rollout(policy):
    """A call for every prompt, so that no text is padded."""
    return Rollout(None, policy.sample(TEXTS, list(range(6)), steps=4, adapter="old", batch=2))


def test_texts_of_other_lengths_are_in_other_tables(policy, rollout):
    assert rollout.samples.conditioning.table_of.tolist() == [0, 0, 1, 1, 0, 0]
    assert len(rollout.samples.conditioning.tables) == 2
    together = policy.sample(TEXTS, list(range(6)), steps=4, adapter="old")
    assert together.conditioning.table_of.tolist() == [0] * 6  # in one call they are padded to the longest
    torch.testing.assert_close(together.x0, rollout.x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [2, 3, 100])
def test_losses_of_a_plan_by_tables_are_those_of_one_image_at_a_time(policy, rollout, micro_batch):
    tables, settings = rollout.samples.conditioning.table_of, Objective(beta=0.5, kl=1.0, timesteps=2)
    plan = plan_epoch(6, 4, timesteps=2, updates=1, micro_batch=micro_batch, seed=0, epoch=0, tables=tables)[0]
    assert all(len(tables[visits.images].unique()) == 1 for visits in plan)
    assert max(map(len, plan)) == min(micro_batch, 8)
    found = {}
    for visits in plan:
        loss, kl = visit_loss(policy, rollout, visits, settings)
        for n, (image, step) in enumerate(zip(visits.images.tolist(), visits.steps.tolist(), strict=True)):
            one = Visits(torch.tensor([image]), torch.tensor([step]), visits.noise_seeds[n : n + 1])
            alone, alone_kl = visit_loss(policy, rollout, one, settings)
            torch.testing.assert_close(loss.const[n], alone.const[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loss.slope[n], alone.slope[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(kl[n], alone_kl[0], rtol=1e-4, atol=1e-5)
            found[image, step] = loss.slope[n].item()
    assert len(found) == 12
    assert len(set(found.values())) == 12


def test_without_tables_a_plan_mixes_what_cannot_be_in_one_call(policy, rollout):
    plan = plan_epoch(6, 4, timesteps=1, updates=1, micro_batch=6, seed=0, epoch=0)[0]
    with pytest.raises(ValueError, match="texts have different shapes"):
        visit_loss(policy, rollout, plan[0], Objective(timesteps=1))
