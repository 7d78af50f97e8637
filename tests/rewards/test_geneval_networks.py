"""What GenEval's detector finds and what colours it names, against plain computations."""

import math

import numpy as np
import pytest
import torch

from marble import MarbleError
from marble.prompts.coco import COLOURS, NAMES
from marble.rewards.geneval import colours as colours_module
from marble.rewards.geneval.colours import cut_out
from marble.rewards.geneval.detector import check_labels, load_detector

from .genevals import SIDES, colour_the_slow_way, detections_the_slow_way, pictures, pil


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
