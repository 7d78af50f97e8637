"""The gradients that are gathered are those of the losses, on a pipeline with random weights."""

from types import SimpleNamespace

import pytest
import torch

from marble import MarbleError, Reward, group_advantages
from marble.conflict import gather as module
from marble.conflict.gather import gather
from marble.gradients import gram_of, reference_gradients
from marble.objectives.visit import Visits, visit_loss
from marble.prompts import PromptBatch, Record
from marble.rollout import collect

from ..small import GROUP, IMAGES, PROMPTS, Trial, config_of

TEXTS = ["a red circle", "the word cat", "a blue square"]


class Bright(Reward):
    """Mean of a colour."""

    def __init__(self, name, channel, only=""):
        self.name, self.channel, self.only = name, channel, only

    def applies(self, record):
        return self.only in record.text

    def score(self, images, records):
        return images[:, self.channel].float().mean(dim=(1, 2))


@pytest.fixture(scope="module")
def trial(untrained):
    return Trial.of(untrained)


def batch_of(number):
    return PromptBatch([Record(text, "x") for text in TEXTS], GROUP, [100 * number + i for i in range(IMAGES)])


def parts_of(trial, config, rewards=None):
    parts = trial.parts(config)
    parts.rewards = rewards or [Bright("red", 0), Bright("green", 1), Bright("words", 2, only="word")]
    parts.prompts = SimpleNamespace(batch=batch_of)
    return parts


CONFIG = {"objective": {"amax": 1.5}, "optimizer": {"updates_per_epoch": 2, "micro_batch": 5}}


def test_rows_are_the_reference_gradients(trial):
    """The trial's adapter is away from the sampling one, so that the common row is not zero."""
    config = config_of(**CONFIG)
    parts, seen = parts_of(trial, config), []
    found = gather(config, parts, 3, lambda done, whole: seen.append((done, whole)))
    assert seen == [(done, 6) for done in range(1, 7)]
    assert found.names == ["red", "green", "words"]
    assert found.scores.shape == found.judgeable.shape == (3 * IMAGES, 3)
    assert found.judgeable.mean(axis=0).tolist() == pytest.approx([1, 1, 1 / 3])
    assert found.prompts == 3 * PROMPTS
    assert torch.cat(found.groups).unique().numel() == 3 * PROMPTS
    assert found.visits == IMAGES

    rollout = collect(parts.policy, batch_of(1), steps=4, images_per_call=IMAGES)
    total = torch.zeros(5, found.parameters)
    for number, plan in enumerate(trial.plan(config, epoch=1)):
        visits = Visits(
            torch.cat([part.images for part in plan]),
            torch.cat([part.steps for part in plan]),
            tuple(seed for part in plan for seed in part.noise_seeds),
        )
        loss, _ = visit_loss(parts.policy, rollout, visits, config.objective)
        scores = torch.tensor(found.scores[IMAGES : 2 * IMAGES])
        weighted = torch.where(scores.isnan(), 0.0, scores).sum(dim=1, keepdim=True)  # red + green + words, if it can
        own = found.advantages[1]
        groups = torch.arange(IMAGES) // GROUP
        raw = group_advantages(weighted, groups, None, "batch").float()
        zero = torch.zeros(IMAGES, 1)
        columns = torch.cat([own, raw, zero], dim=1)[visits.images]
        rows = reference_gradients(loss, columns, parts.policy.parameters)
        rows[:-1] -= rows[-1:].clone()  # the common part, which the reference has in every gradient
        torch.testing.assert_close(found.grams[1][number], gram_of(rows), rtol=1e-3, atol=1e-4 * gram_of(rows).max())
        total += rows / 2
    kept = found.across._sums[1]
    torch.testing.assert_close(kept, total, rtol=1e-3, atol=1e-4 * total.abs().max().item())


def test_memory_that_does_not_suffice_changes_nothing(trial, monkeypatch):
    config = config_of(**CONFIG)
    whole = gather(config, parts_of(trial, config), 3)
    real, refused = module.visit_loss, []

    def short(policy, rollout, visits, settings):
        if len(visits) > 3:
            refused.append(len(visits))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, rollout, visits, settings)

    monkeypatch.setattr(module, "visit_loss", short)
    halved = gather(config, parts_of(trial, config), 3)
    assert refused == [5]  # later updates begin with halves
    torch.testing.assert_close(halved.grams[2][1], whole.grams[2][1], rtol=1e-4, atol=1e-9)


def test_pictures_are_those_of_the_greatest_discord(trial):
    config = config_of(**CONFIG)
    found = gather(config, parts_of(trial, config), 3)
    discords = [picture.discord for picture in found.pictures]
    assert len(found.pictures) == PROMPTS  # one a prompt
    assert discords == sorted(discords, reverse=True)
    assert found.pictures[0].pixels.dtype == torch.uint8
    apart = torch.cat(found.advantages)[:, :2]
    assert max(discords) >= (apart.max(dim=1).values - apart.min(dim=1).values).max().item()


def test_a_reward_that_never_answers_stops_it(trial):
    config = config_of(**CONFIG)
    silent = Bright("green", 1)
    silent.score = lambda images, records: torch.full((len(images),), torch.nan)
    with pytest.raises(MarbleError, match="no score of green"):
        gather(config, parts_of(trial, config, [Bright("red", 0), silent, Bright("blue", 2)]), 3)


def test_rows_that_no_memory_would_hold_are_refused(trial, monkeypatch):
    config = config_of(**CONFIG)
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with pytest.raises(MarbleError, match=r"lower model\.lora\.rank or fewer --batches"):
        gather(config, parts_of(trial, config), 3)
