"""GenEval's three rewards as a whole."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record, load_source
from marble.prompts.coco import COLOURS, RELATIONS
from marble.rewards.geneval import referee as referee_module
from marble.rewards.geneval.logic import Asked, Found, decide
from marble.rewards.load import make_reward

from .genevals import SIDES, build_detector, colour_the_slow_way, detections_the_slow_way, pictures, pil


@pytest.fixture(scope="module")
def settings(detector_folder, clip_folder):
    return {
        "detector": str(detector_folder),
        "clip": str(clip_folder),
        "threshold": 0.3,
        "counting_threshold": 0.5,
        "max_objects": 3,
        "margin": 0.0,
        "shortest_side": SIDES[0],
        "longest_side": SIDES[1],
    }


def three(settings):
    """The three rewards as a config makes them."""
    names = ("geneval", "geneval-accuracy", "geneval-strict-accuracy")
    return [make_reward(RewardUse(reward=name, settings=settings)) for name in names]


def asked_of(seen):
    """A prompt for each picture, about what is to be seen in it; some ask for a little else."""
    records = []
    for i, rows in enumerate(seen):
        counts = Counter([row[0] for row in rows if row[1] > 0.3][:9])
        a, b = ({"name": name, "count": min(count, 3)} for name, count in counts.most_common(2))
        if i < 8:
            objects = [[a], [{**a, "count": 1}], [a, b], [{**a, "count": i - 1}]][i % 4]
            targets = {"task": "counting" if i % 4 == 3 else "two_object", "objects": objects}
            if i == 5:
                targets["exclude"] = [b]
        elif i < 18:
            other = b if i % 2 else {**b, "colour": COLOURS[i - 8]}
            targets = {"task": "color_attr", "objects": [{**a, "colour": COLOURS[i - 8]}, other]}
        else:
            targets = {"task": "position", "objects": [a, b], "relation": [RELATIONS[i % 4], 1, 0]}
        records.append(Record(f"prompt {i}", "test", targets))
    return records


@pytest.fixture(scope="module")
def scene(detector):
    """Pictures with their prompts, and what the detector sees in them by a plain computation."""
    images = pictures(34, 37, 51, seed=2)
    seen = detections_the_slow_way(detector.network, images, (64, 88), (64, 96))
    return images, asked_of(seen), seen


def verdict_the_slow_way(folder, image, targets, rows):
    least = 0.5 if targets["task"] == "counting" else 0.3
    names = [o["name"] for o in targets["objects"] + targets.get("exclude", [])]
    best = {name: [row for row in rows if row[0] == name and row[1] > least][:3] for name in names}
    found = {name: [Found(row[2]) for row in of_class] for name, of_class in best.items()}
    for o in targets["objects"]:
        if "colour" in o and len(best[o["name"]]) >= o["count"]:
            cosines = [colour_the_slow_way(folder, pil(image), r[3], r[2], r[0]) for r in best[o["name"]]]
            named = [COLOURS[int(np.argmax(each))] for each in cosines]
            found[o["name"]] = [Found(r[2], c) for r, c in zip(best[o["name"]], named, strict=True)]
    return decide(Asked.of(targets), found, 0.0)


def test_the_whole_is_what_its_parts_make(settings, scene, clip_folder):
    images, records, seen = scene
    verdicts = [
        verdict_the_slow_way(clip_folder, image, record.targets, rows)
        for image, record, rows in zip(images, records, seen, strict=True)
    ]
    credit, accuracy, strict = (reward.score(images, records) for reward in three(settings))
    assert torch.allclose(credit, torch.tensor([v.credit for v in verdicts]), atol=1e-6)
    assert accuracy.tolist() == [v.accuracy for v in verdicts]
    assert strict.tolist() == [v.strict for v in verdicts]
    assert len(set(credit.tolist())) > 4
    assert not torch.equal(accuracy, strict)
    for of_task in (slice(8), slice(8, 18), slice(18, None)):
        assert 0 < accuracy[of_task].mean() < 1
    slip = make_reward(RewardUse(reward="geneval", settings={**settings, "published_position_bug": True}))
    assert torch.allclose(slip.score(images, records), torch.tensor([v.published_credit for v in verdicts]), atol=1e-6)
    assert any(v.published_credit != v.credit for v in verdicts)


def test_the_three_look_once_in_whatever_order_they_ask(settings, scene):
    images, records, _ = scene
    settings = {**settings, "margin": 0.05}  # a referee of its own
    rewards = three(settings)
    first = [reward.score(images, records) for reward in rewards]
    referee = rewards[0].parts
    assert all(reward.parts is referee for reward in rewards)
    assert referee.looked_at == len(images)
    again = [reward.score(images, records) for reward in three(settings)[::-1]][::-1]
    assert referee.looked_at == len(images)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    rewards[0].score(images[:3], records[:3])  # another call is looked at whole, though its images are known
    assert referee.looked_at == len(images) + 3
    rewards[0].score(images[:3], [*records[:2], records[4]])  # other targets, too
    rewards[0].score(images[[0, 1, 3]], records[:3])
    assert referee.looked_at == len(images) + 9


def test_memory_is_bounded_and_changes_no_score(settings, scene, monkeypatch):
    images, records, _ = scene
    monkeypatch.setattr(referee_module, "REMEMBERED", 2)
    reward = three({**settings, "margin": 0.06})[0]
    scores = [reward.score(images[i : i + 2], records[i : i + 2]) for i in (0, 2, 4, 0)]
    assert reward.parts.looked_at == 8  # the first was forgotten
    assert torch.equal(scores[0], scores[3])
    reward.score(images[4:6], records[4:6])
    assert reward.parts.looked_at == 8


def test_threads_that_ask_for_the_same_look_once(settings, scene):
    images, records, _ = scene
    rewards = three({**settings, "margin": 0.07})
    with ThreadPoolExecutor(3) as pool:
        scores = list(pool.map(lambda reward: reward.score(images, records), rewards))
    assert rewards[0].parts is rewards[1].parts is rewards[2].parts
    assert rewards[0].parts.looked_at == len(images)
    assert all(torch.equal(mine, reward.score(images, records)) for mine, reward in zip(scores, rewards, strict=True))


def test_networks_are_shared_by_other_rules_too(settings):
    one, two = three(settings)[0], three({**settings, "threshold": 0.5})[0]
    assert one.parts is not two.parts
    assert one.parts.detector is two.parts.detector
    assert one.parts.colours.clip.network is two.parts.colours.clip.network


def test_loading_says_what_scores_and_leaves_random_numbers_alone(settings, tmp_path):
    folder = build_detector(tmp_path / "detector", seed=1)
    reward = three({**settings, "detector": str(folder)})[0]
    assert reward.revision == f"{folder}@main + {settings['clip']}@main"
    state = torch.get_rng_state()
    reward.prepare()
    assert torch.equal(torch.get_rng_state(), state)
    before, after = reward.revision.split(" + ")
    assert before.startswith("detector@sha256:")
    assert "@sha256:" in after
    assert three(settings)[0].parts.revision != reward.revision


def test_it_applies_to_what_it_knows_alone():
    for reward in three({}):
        assert all(reward.applies(record) for record in load_source("compositional", "held-out"))
        assert not any(reward.applies(record) for record in load_source("mini-objects", "held-out"))
        assert not reward.applies(Record("a bench", "x"))
        assert all(getattr(reward.facts, field.name) for field in fields(reward.facts))
        assert reward.about


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("geneval", {"threshold": 1.5}, r"geneval: settings\.threshold must be from 0 to 1, got 1\.5"),
        ("geneval", {"counting_threshold": -0.1}, r"settings\.counting_threshold must be from 0 to 1"),
        ("geneval", {"margin": -1}, r"settings\.margin must be at least 0, got -1"),
        ("geneval", {"max_objects": 0}, r"settings\.max_objects must be at least 1, got 0"),
        ("geneval", {"shortest_side": 900, "longest_side": 800}, "must be at least shortest_side, got 800 and 900"),
        ("geneval-accuracy", {"published_position_bug": True}, "is of geneval alone; leave it out"),
        ("geneval", {"treshold": 0.1}, 'unknown setting "treshold". Did you mean "threshold"'),
        ("geneval", {"dtype": "float8"}, r"settings\.dtype"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, given, message):
    with pytest.raises(MarbleError, match=message):
        make_reward(RewardUse(reward=name, settings=given))


def test_colours_in_half_precision(settings, scene):
    images, records, _ = scene
    reward = three({**settings, "dtype": "bfloat16"})[0]
    whole = three(settings)[0].score(images, records)
    assert (reward.score(images, records) - whole).abs().mean() < 0.1  # a colour may turn out another
    assert reward.parts.detector is three(settings)[0].parts.detector
