import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record, load_source
from marble.prompts.coco import COLOURS, NAMES, RELATIONS
from marble.rewards.clip import load_clip
from marble.rewards.geneval import colours as colours_module
from marble.rewards.geneval import referee as referee_module
from marble.rewards.geneval.colours import ColourNamer, cut_out
from marble.rewards.geneval.detector import check_labels, load_detector
from marble.rewards.geneval.logic import Found, Asked, decide
from marble.rewards.load import make_reward

SIDES = (64, 96)
QUERIES = 12


def build_detector(folder, labels=80, seed=0):
    """A Mask2Former with random weights, sure of its classes and its small masks, in a folder as the hub has them."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=QUERIES,
        num_labels=labels,
    )
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.mul_(30)
        onto = network.model.pixel_level_module.decoder.mask_projection
        onto.weight[0], onto.bias[0] = 0, 1
        last = network.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule("2.0")
        for part in (last.weight, last.bias):
            part.mul_(100)
        last.weight[0], last.bias[0] = 0, -4  # all logits lower by 4: about a twentieth of the picture is left
    network.save_pretrained(folder)
    # a fixed square, as the published folder has it, is not what GenEval used
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    return build_detector(tmp_path_factory.mktemp("detector"), seed=4)


@pytest.fixture(scope="module")
def detector(detector_folder):
    return load_detector(str(detector_folder), None, torch.device("cpu"), SIDES)


def pictures(count, height, width, seed=0):
    """Smooth random colours, `[N, 3, H, W]` uint8."""
    torch.manual_seed(seed)
    small = torch.rand(count, 3, 5, 4)
    return (F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def detections_the_slow_way(network, images, inner, padded):
    """Of each image (class, score, box, mask) of the 100 likeliest pairs, best first, by PIL and plain loops."""
    height, width = images.shape[-2:]
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
    inputs = np.zeros((len(images), padded[0], padded[1], 3), np.float32)
    for i, image in enumerate(images):
        resized = pil(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
        inputs[i, : inner[0], : inner[1]] = (np.asarray(resized, np.float32) / 255 - mean) / std
    with torch.no_grad():
        outputs = network(pixel_values=torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous())
    found = []
    for logits, masks in zip(outputs.class_queries_logits.numpy(), outputs.masks_queries_logits, strict=True):
        drawn = F.interpolate(masks[:, None], size=padded, mode="bilinear", align_corners=False)
        drawn = F.interpolate(drawn[..., : inner[0], : inner[1]], (height, width), mode="bilinear")[:, 0].numpy()
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances = exps / exps.sum(axis=1, keepdims=True)
        pairs = [(chances[q, c], q, c) for q in range(QUERIES) for c in range(80)]
        rows = []
        for chance, q, c in sorted(pairs, reverse=True)[:100]:
            ys, xs = np.nonzero(drawn[q] > 0)
            if len(ys):
                sure = (1 / (1 + np.exp(-drawn[q][ys, xs]))).sum() / (len(ys) + 1e-6)
                box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                rows.append((NAMES[c], chance * sure, box, drawn[q] > 0))
        found.append(sorted(rows, key=lambda row: -row[1]))
    return found


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((37, 51), (64, 88), (64, 96)),  # × 64/37
        ((90, 61), (94, 64), (96, 64)),  # × 64/61
        ((20, 90), (21, 96), (32, 96)),  # × 96/90: the longer side binds
        ((130, 130), (64, 64), (64, 64)),
    ],
)
def test_detections_are_those_of_a_plain_computation(detector, size, inner, padded):
    images = pictures(3, *size)
    images[2] = images[2, :1]  # grey
    with torch.no_grad():
        found = detector.detect(images)
    for mine, theirs in zip(found, detections_the_slow_way(detector.network, images, inner, padded), strict=True):
        assert len(mine) == len(theirs) > 50
        assert [d.name for d in mine[:30]] == [row[0] for row in theirs[:30]]
        for detection, (_, score, box, mask) in zip(mine, theirs, strict=True):
            assert math.isclose(detection.score, score, abs_tol=1e-6)
            if score > 1e-3:  # the order of the rest hangs on last bits
                assert detection.box == box
                assert np.array_equal(detection.mask.numpy(), mask)
    assert any(d.box != (0, 0, size[1], size[0]) for d in found[0])


def test_leaving_out_the_unlikely_changes_no_other_detection(detector):
    images = pictures(2, 48, 64, seed=1)
    with torch.no_grad():
        whole, part = detector.detect(images), detector.detect(images, 0.2)
    for all_found, some in zip(whole, part, strict=True):
        likely = [d for d in all_found if d.score > 0.2]
        assert 0 < len(some) < len(all_found)
        assert [(d.name, d.box) for d in some] == [(d.name, d.box) for d in likely]
        assert all(math.isclose(a.score, b.score, rel_tol=1e-6) for a, b in zip(some, likely, strict=True))
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(some, likely, strict=True))
    with torch.no_grad():
        assert detector.detect(images, 1.0) == [[], []]


def test_a_detector_is_loaded_once(detector, detector_folder):
    assert load_detector(str(detector_folder), None, torch.device("cpu"), SIDES) is detector
    assert not detector.network.training


def test_classes_must_be_cocos_in_order():
    names = dict(enumerate(NAMES))
    check_labels({**names, 64: "mouse", 62: "tvmonitor"}, "x")
    check_labels({i: f"LABEL_{i}" for i in range(80)}, "x")
    with pytest.raises(MarbleError, match="must know COCO's 80 classes, it knows 133"):
        check_labels({i: f"LABEL_{i}" for i in range(133)}, "x")
    with pytest.raises(MarbleError, match='class 1 of "x" must be bicycle as in COCO, it is car'):
        check_labels({**names, 1: "car", 2: "bicycle"}, "x")


def test_a_detector_that_is_not_whole_is_refused(tmp_path, detector_folder):
    from safetensors.torch import load_file, save_file

    with pytest.raises(MarbleError, match=r"settings.detector: .*does not exist"):
        load_detector(str(tmp_path / "nowhere"), None, torch.device("cpu"), SIDES)
    state = load_file(detector_folder / "model.safetensors")
    index = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    older = {**state, index: torch.zeros(16, 16, dtype=torch.int64)}  # as the published folder has it
    lacking = {key: value for key, value in state.items() if key != "class_predictor.bias"}
    for name, some in (("older", older), ("lacking", lacking)):
        (tmp_path / name).mkdir()
        for file in detector_folder.glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        save_file(some, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    load_detector(str(tmp_path / "older"), None, torch.device("cpu"), SIDES)
    with pytest.raises(MarbleError, match=r"is not whole: it has no class_predictor\.bias"):
        load_detector(str(tmp_path / "lacking"), None, torch.device("cpu"), SIDES)


def test_very_narrow_pictures_are_looked_at_too(detector):
    with torch.no_grad():
        found = detector.detect(pictures(1, 300, 1))[0]  # × 96/300 would be a third of a pixel wide
    assert all(d.mask.shape == (300, 1) and d.box[2] <= 1 for d in found)


def build_clip(folder, seed=0):
    """A CLIP with random weights and a tokenizer of bytes, in a folder as the hub has them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = [*map(chr, range(33, 127))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    network = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": len(tokens), "max_position_embeddings": 77, **ends},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"size": {"shortest_edge": 32}, "crop_size": 32, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def namer(clip_folder):
    return ColourNamer(load_clip(str(clip_folder), None, torch.device("cpu"), torch.float32))


def colour_the_slow_way(folder, image, mask, box, name):
    """Cosines with the ten colours, by PIL, numpy and the stock network."""
    from transformers import CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    grey = Image.new("RGB", image.size, color="#999")
    crop = Image.composite(image, grey, Image.fromarray(mask)).crop(box)
    width, height = crop.size
    size = (32, int(32 * height / width)) if width < height else (int(32 * width / height), 32)
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    left, top = round((crop.width - 32) / 2), round((crop.height - 32) / 2)
    pixels = np.asarray(crop.crop((left, top, left + 32, top + 32)), np.float32) / 255
    pixels = (pixels - np.array([0.4, 0.5, 0.6], np.float32)) / np.array([0.3, 0.2, 0.1], np.float32)
    with torch.no_grad():
        seen = network.get_image_features(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None])
        seen = seen.pooler_output[0].numpy()
        cosines = []
        for colour in COLOURS:
            directions = []
            for text in (
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            ):
                words = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
                read = network.get_text_features(**words).pooler_output[0].numpy()
                directions.append(read / np.linalg.norm(read))
            mean = np.mean(directions, axis=0)
            cosines.append(float(seen @ mean / np.linalg.norm(seen) / np.linalg.norm(mean)))
    return cosines


@pytest.mark.parametrize(
    ("size", "box"), [((40, 60), (6, 3, 43, 30)), ((61, 37), (0, 0, 37, 61)), ((33, 50), (10, 5, 19, 31))]
)
def test_colours_are_those_of_a_plain_computation(namer, clip_folder, size, box):
    image = pictures(1, *size)[0]
    mask = pictures(1, *size, seed=3)[0, 0] > 100
    expected = colour_the_slow_way(clip_folder, pil(image), mask.numpy(), box, "tv remote")
    crop = cut_out(image, mask, box)
    assert crop.shape == (3, box[3] - box[1], box[2] - box[0])
    assert (crop[:, ~mask[box[1] : box[3], box[0] : box[2]]] == 0x99).all()
    with torch.no_grad():
        cosines = namer.cosines([crop], ["tv remote"])
        assert np.allclose(cosines[0].numpy(), expected, rtol=0, atol=1e-5)
        assert np.std(expected) > 1e-4  # colours are told apart, so that another text or order would be noticed
        assert namer.name([crop], ["tv remote"]) == [COLOURS[int(np.argmax(expected))]]


def test_colours_of_many_are_those_of_each(namer, monkeypatch):
    crops = [image[:, : 20 + 3 * i, : 50 - 4 * i] for i, image in enumerate(pictures(7, 50, 50))]
    classes = ["dog", "cat", "dog", "bench", "cat", "dog", "person"]
    with torch.no_grad():
        alone = torch.cat([namer.cosines([crop], [name]) for crop, name in zip(crops, classes, strict=True)])
        monkeypatch.setattr(colours_module, "MOST", 3)
        together = namer.cosines(crops, classes)
        assert namer.cosines([], []).shape == (0, 10)
        assert namer.name([], []) == []
    assert torch.allclose(alone, together, rtol=0, atol=1e-6)


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
