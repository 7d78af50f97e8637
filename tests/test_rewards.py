import threading
import time

import pytest
import torch

from marble import MarbleError, Reward
from marble.prompts import Record
from marble.rewards import load_rewards, score_images

RECORDS = [Record("a", "s", {"text": "A"}), Record("b", "s"), Record("a", "s", {"text": "A"}), Record("b", "s")]
GROUPS = torch.tensor([0, 1, 0, 1])


class Brightness(Reward):
    name = "brightness"

    def score(self, images, records):
        assert images.dtype == torch.uint8
        return images.float().mean(dim=(1, 2, 3))


class Floats(Reward):
    name = "floats"
    wants_floats = True

    def score(self, images, records):
        assert images.dtype == torch.float32
        return images.mean(dim=(1, 2, 3))


class OnlyText(Brightness):
    name = "only text"

    def applies(self, record):
        return "text" in record.targets


class Together(Reward):
    name = "together"
    groupwise = True

    def score(self, images, records):
        assert len({r.text for r in records}) == 1
        return torch.full((len(images),), float(len(images)))


class Broken(Reward):
    name = "broken"

    def score(self, images, records):
        return torch.tensor([1.0, torch.inf, torch.nan, 4.0])


class Misshapen(Reward):
    name = "misshapen"

    def score(self, images, records):
        return torch.ones(1)


NOT_A_REWARD = object()


SHADES = torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None, None, None].expand(4, 3, 2, 2).contiguous()


def test_table():
    images = SHADES
    table = score_images([Brightness(), Floats(), OnlyText(), Together(), Broken()], images, RECORDS, GROUPS)
    assert table.scores[:, 0].tolist() == [0.0, 64.0, 128.0, 255.0]  # rounded to 8 bits, halves to even
    assert table.scores[:, 1].tolist() == [0.0, 0.25, 0.5, 1.0]
    assert table.applies[:, 2].tolist() == [True, False, True, False]
    assert table.scores[1, 2].isnan()
    assert table.scores[:, 3].tolist() == [2.0] * 4
    assert table.applies[:, 4].tolist() == [True, False, False, True]  # what is not finite is missing


class Raising(Reward):
    name = "raising"

    def score(self, images, records):
        raise KeyError("colour")


class Hanging(Reward):
    name = "hanging"
    timeout = 0.05
    batch = 1

    def __init__(self):
        self.release = threading.Event()

    def score(self, images, records):
        self.release.wait()
        return torch.ones(len(images))


def test_a_reward_that_fails_leaves_scores_missing_and_says_why(caplog):
    hanging = Hanging()
    table = score_images([Misshapen(), Raising(), hanging, Brightness(), Broken()], SHADES, RECORDS, GROUPS)
    assert table.missing.tolist() == [4, 4, 4, 0, 2]
    assert table.silent == ["misshapen", "raising", "hanging"]
    assert table.scores[:, 3].tolist() == [0.0, 64.0, 128.0, 255.0]
    assert table.metrics()["missing"] == {"misshapen": 4, "raising": 4, "hanging": 4, "broken": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "reward misshapen: no score for 4 of 4 images: score() must return one number an image, [4], got shape [1]",
        "reward raising: no score for 4 of 4 images: KeyError: 'colour'",
        "reward hanging: no score for 1 of 4 images: did not answer within 0.05 s",
        "reward hanging: no score for 3 of 4 images: an earlier call has not come back",
        "reward broken: no score for 2 of 4 images: it answered with no number",
    ]
    again = score_images([hanging], SHADES, RECORDS, GROUPS)  # it hangs still: no time is lost on it
    assert again.silent == ["hanging"]
    hanging.release.set()
    deadline = time.monotonic() + 10
    while score_images([hanging], SHADES, RECORDS, GROUPS).silent:  # and is back as soon as its call is
        assert time.monotonic() < deadline
    assert again.missing.tolist() == [4]


def test_what_applies_raises_is_the_rewards_mistake():
    class NoTargets(Brightness):
        name = "no targets"

        def applies(self, record):
            return record.targets["text"] != ""

    with pytest.raises(MarbleError, match=r"reward no targets: applies\(\) fails on a prompt: KeyError: 'text'"):
        score_images([NoTargets()], SHADES, RECORDS, GROUPS)


def test_by_dotted_path_and_unknown():
    assert load_rewards([f"{__name__}:Brightness"])[0].name == "brightness"
    with pytest.raises(MarbleError, match="it has no name, applies, score"):
        load_rewards([f"{__name__}:NOT_A_REWARD"])
    with pytest.raises(MarbleError, match="cannot load reward"):
        load_rewards([f"{__name__}:Missing"])
    with pytest.raises(MarbleError, match="given more than once"):
        load_rewards([f"{__name__}:Brightness", f"{__name__}:Brightness"])
    with pytest.raises(MarbleError, match="Did you mean"):
        load_rewards(["mini-aesthetics"])


# ---- videos ---------------------------------------------------------------------------------------------


class Whole(Reward):
    name = "whole"
    judges_videos = True

    def score(self, images, records):
        self.shape = tuple(images.shape)
        return images[:, -1].float().mean(dim=(1, 2, 3)) - images[:, 0].float().mean(dim=(1, 2, 3))


class Counting(Reward):
    """Remembers what it is given, and scores a frame by its brightness."""

    name = "counting"

    def __init__(self):
        self.seen = []

    def score(self, images, records):
        assert images.ndim == 4
        self.seen.append(images[:, 0, 0, 0].tolist())
        return images.float().mean(dim=(1, 2, 3))


class Now(Counting):
    """Judges a group of one moment together."""

    name = "now"
    groupwise = True


class NotBlack(Reward):
    name = "not black"

    def score(self, images, records):
        scores = images.float().mean(dim=(1, 2, 3))
        return torch.where(scores > 0, scores, torch.nan)


def videos(*rows):
    """`[N, F, 3, 2, 2]` of frames of one brightness each, in 255ths."""
    return (torch.tensor(rows) / 255)[:, :, None, None, None].expand(-1, -1, 3, 2, 2).contiguous()


CLIPS = videos([0.0, 30, 60, 90, 120], [10, 10, 10, 10, 10], [0, 0, 0, 0, 5], [200, 100, 0, 100, 200])


def score_of(reward, frames=None, clips=CLIPS):
    return score_images([reward], clips, RECORDS, GROUPS, frames=frames).scores[:, 0].tolist()


def test_a_reward_for_images_judges_the_frames_and_their_mean_counts():
    assert score_of(Brightness()) == [60.0, 10.0, 1.0, 120.0]
    assert score_of(Floats()) == pytest.approx([each / 255 for each in (60.0, 10.0, 1.0, 120.0)])


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (2, [60.0, 10.0, 2.5, 200.0]),  # the first and the last
        (3, [60.0, 10.0, 5 / 3, 400 / 3]),  # and the middle
        (5, [60.0, 10.0, 1.0, 120.0]),
        (9, [60.0, 10.0, 1.0, 120.0]),  # no more than there are
    ],
)
def test_some_frames_evenly_spaced(frames, expected):
    assert score_of(Brightness(), frames) == pytest.approx(expected)
    counting = Counting()
    score_of(counting, frames)
    assert len(counting.seen) == min(frames, 5)
    assert all(len(moment) == 4 for moment in counting.seen)


def test_a_reward_for_videos_gets_them_whole_however_few_frames_are_judged():
    reward = Whole()
    assert score_of(reward, frames=2) == [120.0, 0.0, 5.0, 0.0]
    assert reward.shape == (4, 5, 3, 2, 2)


def test_groups_of_a_video_are_of_one_moment():
    reward = Now()
    assert score_of(reward, frames=2) == [60.0, 10.0, 2.5, 200.0]
    assert reward.seen == [[0, 0], [120, 5], [10, 200], [10, 200]]  # prompt a's videos, then b's


def test_a_frame_without_a_score_takes_no_part_in_the_mean():
    assert score_of(NotBlack())[:3] == [75.0, 10.0, 5.0]
    table = score_images([NotBlack()], 0 * CLIPS, RECORDS, GROUPS)
    assert not table.applies.any()


def test_a_video_reward_that_answers_for_frames_gives_no_score(caplog):
    class ByFrame(Whole):
        name = "by frame"

        def score(self, images, records):
            return images.float().mean(dim=(2, 3, 4))

    assert torch.tensor(score_of(ByFrame())).isnan().all()
    assert "score() must return one number an image, [4], got shape [4, 5]" in caplog.text


def test_an_object_with_no_more_than_is_asked_of_a_reward():
    """`load_rewards` wants a name, `applies` and `score` of it."""

    class Duck:
        name = "duck"

        def applies(self, record):
            return True

        def score(self, images, records):
            return images.float().mean(dim=(1, 2, 3))

    assert score_of(Duck(), clips=CLIPS[:, 1]) == [30.0, 10.0, 0.0, 100.0]
