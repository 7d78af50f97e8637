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


def test_table():
    images = torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    table = score_images([Brightness(), Floats(), OnlyText(), Together(), Broken()], images, RECORDS, GROUPS)
    assert table.scores[:, 0].tolist() == [0.0, 64.0, 128.0, 255.0]  # rounded to 8 bits, halves to even
    assert table.scores[:, 1].tolist() == [0.0, 0.25, 0.5, 1.0]
    assert table.applies[:, 2].tolist() == [True, False, True, False]
    assert table.scores[1, 2].isnan()
    assert table.scores[:, 3].tolist() == [2.0] * 4
    assert table.applies[:, 4].tolist() == [True, False, False, True]  # what is not finite is missing
    with pytest.raises(MarbleError, match=r"reward misshapen: score\(\) must return one number an image, \[4\], got"):
        score_images([Misshapen()], images, RECORDS, GROUPS)


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
