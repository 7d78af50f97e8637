"""The miniature world's rewards.

Three general ones (aesthetic, alignment, preference) judge every picture, two specialists (text,
composition) only pictures of their own prompts; diversity judges groups; a second alignment judge is kept
for evaluation. The general ones are scaled by `GENERAL`, so that within the images of one prompt they
spread about a twentieth as far as the specialists, as PickScore/26, CLIPScore and HPS do beside OCR and GenEval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from marble.mini import weights_folder
from marble.mini.judges import CaptionIds, Judge, load_judge
from marble.mini.verify import Found, ThingFinder, WordReader
from marble.mini.world import WORLDS
from marble.prompts import Record
from marble.rewards import Reward
from marble.rewards.ocr import edit_distance

GENERAL = 0.045
"""Full marks of the general rewards unless told otherwise, of which the specialists' are 1."""
MAP = 5
"""Side of the maps that diversity compares: coarse enough to average grain away."""
FAINT = 0.1
"""Difference of neighbouring patches (RGB in 0 to 1) up to which diversity sees no edge."""
WorldName = Literal["mini", "mini-b"]


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    """0 at `low`, 1 at `high`, straight between and flat beyond; `low` may be the larger."""
    return ((value - low) / (high - low)).clamp(0, 1)


class Aesthetic(Reward):
    """How well a picture is finished, whatever it shows: clean, crisp, gently lit, neither grey nor garish.

    The factors multiply, so nothing that fails one of them can make up for it elsewhere: noise is not
    clean, flat colour is neither crisp nor lit, saturation beyond the band costs what it gains.
    """

    name = "aesthetic"
    needs_prompt = False
    about = "closed form: clean × colour in a band × crisp edges and light falling off to the corners; 0 to 0.045"

    def __init__(self, *, world: WorldName = "mini", marks: float = GENERAL) -> None:
        """Full marks are `marks`; the world changes nothing but the revision."""
        self.revision, self.marks = WORLDS[world].revision, marks

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in 0 to `marks`."""
        pixels = images.float() / 255
        return self.marks * self.factors(pixels).prod(dim=1)

    def factors(self, pixels: Tensor) -> Tensor:
        """`[N, 3]` in [0, 1]: clean, colour, finish (the geometric mean of crisp and light)."""
        red, green, blue = pixels.unbind(1)
        light = 0.299 * red + 0.587 * green + 0.114 * blue
        inner = light[:, 1:-1, 1:-1]
        around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
        grain = (inner - around / 4).abs().flatten(1).median(dim=1).values
        clean = _ramp(grain, 0.03, 0.008)
        across, down = (
            pixels[:, :, 1:-1, 2:] - pixels[:, :, 1:-1, :-2],
            pixels[:, :, 2:, 1:-1] - pixels[:, :, :-2, 1:-1],
        )
        slope = (across.square() + down.square()).sum(dim=1).sqrt().flatten(1) / 2
        crisp = _ramp(slope.topk(slope.shape[1] // 40, dim=1).values.mean(dim=1), 0.03, 0.14)
        one, two = red - green, (red + green) / 2 - blue
        chroma = torch.stack([one, two], dim=1).flatten(2)
        strength = chroma.std(dim=2).norm(dim=1) + 0.3 * chroma.mean(dim=2).norm(dim=1)
        colour = _ramp(strength, 0.0, 0.05) * _ramp(strength, 0.75, 0.5)
        return torch.stack([clean, colour, (crisp * self._fall_off(light)).sqrt()], dim=1)

    @staticmethod
    def _fall_off(light: Tensor) -> Tensor:
        """Light at the middle of the top and bottom edges over that at their ends, where objects do not stand."""
        size = light.shape[-1]
        eighth = size // 8
        edges = torch.stack([light[:, :3], light[:, -3:]], dim=1).clamp_min(0.01).log()  # [N, 2, 3, S]
        left, right = edges[..., :eighth], edges[..., -eighth:]
        middle = edges[..., size // 2 - eighth : size // 2 + eighth]
        levels = [part.flatten(2).median(dim=2).values for part in (left, middle, right)]
        return _ramp((levels[1] - (levels[0] + levels[2]) / 2).mean(dim=1), 0.02, 0.2)


class TextRendering(Reward):
    """`1 − edit distance / length` between the word read and the word asked for, as OCR rewards have it."""

    name = "text"
    accuracy_above = 1.0
    about = "specialist for words: 1 − edit distance / length of what a template reader reads; 0 to 1"

    def __init__(self, *, world: WorldName = "mini") -> None:
        """For the pictures of a world."""
        self.revision, self.reader = WORLDS[world].revision, WordReader(WORLDS[world])

    def applies(self, record: Record) -> bool:
        """Only where a text is asked for."""
        return "text" in record.targets

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in [0, 1]."""
        targets = [record.targets["text"] for record in records]
        read = self.reader.read(images)
        marks = [1 - min(edit_distance(r, t), len(t)) / len(t) for r, t in zip(read, targets, strict=True)]
        return torch.tensor(marks)


class Composition(Reward):
    """Are the objects there that were asked for: whole, in the right colour, number and place.

    Every object found is matched to one asked for (best total). A match earns 1, or `ONLY_COLOUR` or
    `ONLY_SHAPE` where the other is wrong, times how whole the object is. The sum is divided by the larger
    of the two numbers of objects, so neither missing nor surplus ones pay, and halved if the two stand the
    wrong way round.
    """

    name = "composition"
    accuracy_above = 0.9  # 99 in 100 right pictures have it; one thing wrong costs 0.2 or more
    about = "specialist for objects: whole objects of the right shape, colour, number and place; 0 to 1"
    ONLY_COLOUR = 0.5
    ONLY_SHAPE = 0.35

    def __init__(self, *, world: WorldName = "mini") -> None:
        """For the pictures of a world."""
        self.revision, self.finder = WORLDS[world].revision, ThingFinder(WORLDS[world])

    def applies(self, record: Record) -> bool:
        """Only where objects are asked for."""
        return "objects" in record.targets

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in [0, 1]."""
        found = self.finder.find(images)
        return torch.tensor([self._mark(f, r) for f, r in zip(found, records, strict=True)])

    def _mark(self, found: list[Found], record: Record) -> float:
        wanted = [o for o in record.targets["objects"] for _ in range(o.get("count", 1))]
        if not found:
            return 0.0
        worth = np.array([[self._match(w, f) for f in found] for w in wanted])
        rows, columns = linear_sum_assignment(-worth)
        mark = worth[rows, columns].sum() / max(len(wanted), len(found))
        if "relation" in record.targets:
            mark *= 1.0 if len(rows) > 1 and self._stands(found, columns, record.targets["relation"]) else 0.5
        return float(mark)

    def _match(self, wanted: dict, found: Found) -> float:
        colour, shape = wanted["colour"] == found.colour, wanted["name"] == found.shape
        return found.whole * (1.0 if colour and shape else self.ONLY_COLOUR * colour + self.ONLY_SHAPE * shape)

    @staticmethod
    def _stands(found: list[Found], columns: np.ndarray, relation: list) -> bool:
        word, i, j = relation
        one, two = found[columns[i]], found[columns[j]]
        dx, dy = one.x - two.x, one.y - two.y
        side = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[word]
        return side > 3 and side > 0.7 * max(abs(dx), abs(dy))


class _Judged(Reward):
    """A reward by a trained two-tower judge, 0 for junk and full marks for a right picture."""

    kind: str

    def __init__(self, *, world: WorldName = "mini", marks: float = GENERAL) -> None:
        """For the pictures and captions of a world; right pictures score about `marks`."""
        self.world, self.marks = WORLDS[world], marks
        self.revision = self.world.revision
        self._texts: dict[str, Tensor] = {}

    @cached_property
    def _judge(self) -> tuple[Judge, float, float]:
        return load_judge(self.world, weights_folder(self.world.name) / "judges" / f"{self.kind}.safetensors")

    @torch.no_grad()
    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` in 0 to 1.25 `marks`."""
        judge, low, high = self._judge
        for caption in {r.text for r in records} - self._texts.keys():
            # one by one: in a batch the last bits would depend on what else is in it, and a resumed run asks otherwise
            self._texts[caption] = judge.text(CaptionIds(self.world)([caption]))[0]
        text = torch.stack([self._texts[r.text] for r in records])
        cosine = (judge.image(images.float() / 255) * text).sum(dim=1)
        return self.marks * _ramp(cosine, low, high + 0.25 * (high - low)) * 1.25


class Alignment(_Judged):
    """Does the picture show what the caption says, by a contrastive judge."""

    name = kind = "alignment"
    about = "learned: contrastive text-image judge, junk 0, right pictures about 0.045"


class Preference(_Judged):
    """Would it be preferred among pictures for this caption, by a judge trained on ordered pairs."""

    name = kind = "preference"
    about = "learned: Bradley-Terry judge of pictures for a caption, junk 0, right pictures about 0.045"


class SecondAlignment(_Judged):
    """A second contrastive judge, of another build and other data; for evaluation only."""

    name = "second-alignment"
    kind = "second"
    about = "learned: an alignment judge trained apart, never trained on; junk 0, right pictures about 0.045"


class Diversity(Reward):
    """How far the layout of a picture's outlines is from the others of its prompt: mean RMS distance of coarse maps.

    The maps are 5×5, of the strength of edges between overlapping 8×8 patches, faint ones left out, with their mean
    taken out: grain averages away, tints and flat colours have no edges, blur has faint ones.
    """

    name = "diversity"
    needs_prompt = False
    groupwise = True
    about = "groupwise: mean RMS distance of an image's 5×5 map of outlines to the others of its prompt; 0 to about 0.1"

    def __init__(self, *, world: WorldName = "mini") -> None:
        """The world changes nothing but the revision."""
        self.revision = WORLDS[world].revision

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[G]`, 0 for a group of one."""
        if len(images) < 2:
            return torch.zeros(len(images))
        small = F.avg_pool2d(images.float() / 255, 8, stride=4)
        across, down = small[:, :, 1:, 1:] - small[:, :, 1:, :-1], small[:, :, 1:, 1:] - small[:, :, :-1, 1:]
        edges = (across.square() + down.square()).sum(dim=1, keepdim=True).sqrt()
        layout = F.adaptive_avg_pool2d((edges - FAINT).clamp_min(0), MAP).flatten(1)
        layout = layout - layout.mean(dim=1, keepdim=True)
        distance = (layout[:, None] - layout[None]).square().mean(dim=2).sqrt()
        return distance.sum(dim=1) / (len(images) - 1)


def object_targets(things: Sequence) -> list[dict]:
    """The `objects` targets of a spec's things, equal ones counted."""
    counted = Counter(things)
    return [{"name": t.shape, "colour": t.colour, "size": t.size, "count": n} for t, n in counted.items()]
