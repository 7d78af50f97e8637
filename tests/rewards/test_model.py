"""What rewards by networks have in common: devices, and as many images at once as memory allows."""

import pytest
import torch

from marble import MarbleError
from marble.prompts import Record
from marble.rewards import score_images
from marble.rewards.model import ModelReward


class Small(ModelReward):
    """Has memory for `room` images at once."""

    name = "small"
    revision = "1"
    room, loads = 3, 0

    def load(self):
        self.loads += 1
        self.calls = []
        return "network"

    def judge(self, images, records):
        assert self.parts == "network"
        assert not torch.is_grad_enabled()
        self.calls.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        assert len(records) == len(images)
        return images.double().mean(dim=(1, 2, 3))


def pictures(count):
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)


def records(count):
    return [Record(str(i), "s") for i in range(count)]


def test_short_memory_means_halves_with_the_same_scores(caplog):
    reward = Small()
    scores = reward.score(pictures(10), records(10))
    assert scores.tolist() == list(range(10))
    assert scores.dtype == torch.float32
    assert reward.calls == [10, 5, 3, 3, 3, 1]
    assert "reward small: out of memory with 10 images at once; going on with at most 5" in caplog.text
    reward.calls.clear()
    reward.score(pictures(4), records(4))
    assert reward.calls == [3, 1]  # it remembers
    assert reward.loads == 1


def test_no_memory_for_one_image_is_a_missing_score_that_says_what_helps(caplog):
    reward = Small()
    reward.room = 0
    with pytest.raises(
        MarbleError, match=r"out of memory while judging 1 images: use settings.dtype or settings.device"
    ):
        reward.score(pictures(2), records(2))
    assert score_images([reward], pictures(2) / 255, records(2), torch.arange(2)).silent == ["small"]


def test_groups_are_not_taken_apart():
    reward = Small()
    reward.groupwise = True
    with pytest.raises(MarbleError, match="out of memory while judging 4 images"):
        reward.score(pictures(4), records(4))


def test_other_errors_are_not_mistaken_for_short_memory():
    class Wrong(Small):
        def judge(self, images, records):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Wrong().score(pictures(2), records(2))


def test_loaded_once_and_not_before_it_is_wanted():
    reward = Small()
    assert reward.loads == 0
    reward.prepare()
    reward.prepare()
    reward.score(pictures(1), records(1))
    assert reward.loads == 1


def test_devices():
    assert Small(device="auto").device.type in ("cpu", "cuda")
    with pytest.raises(MarbleError, match=r'settings\.device: "cuda:99" cannot be used here'):
        _ = Small(device="cuda:99").device
    with pytest.raises(MarbleError, match=r'settings\.device: "meta" holds no numbers'):
        _ = Small(device="meta").device


def test_nothing_to_judge():
    assert Small().score(pictures(0), []).shape == (0,)
