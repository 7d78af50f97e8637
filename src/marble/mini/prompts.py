"""The miniature world's prompt sources: plain scenes, words, objects; train and held-out apart by construction."""

from __future__ import annotations

import functools

import numpy as np

from marble.mini.rewards import object_targets
from marble.mini.world import MINI, MINI_B, Spec, World
from marble.prompts import Record

_HELD_OUT_SHARE = {"place": 1 / 3, "attribute": 1 / 5, "count": 1 / 5, "position": 1 / 5}


def to_record(spec: Spec, source: str, world: World = MINI) -> Record:
    """A spec as a prompt with its targets."""
    targets: dict = {}
    if spec.word:
        targets["text"] = spec.word
    if spec.things:
        targets["objects"] = object_targets(spec.things)
    if spec.relation:
        targets["relation"] = [spec.relation, 0, 1]
    return Record(world.caption(spec), source, targets)


def _split(specs: list[Spec], split: str) -> list[Spec]:
    order = np.random.default_rng(len(specs)).permutation(len(specs))
    cut = round(len(specs) * _HELD_OUT_SHARE[specs[0].kind])
    chosen = order[:cut] if split == "held-out" else order[cut:]
    return [specs[i] for i in chosen]


def places(split: str, world: World = MINI) -> list[Record]:
    """Plain scenes."""
    return [to_record(spec, "places", world) for spec in _split(world.place_specs(), split)]


def words(split: str, world: World = MINI) -> list[Record]:
    """Words to render; the held-out split has words that the other lacks."""
    specs = world.word_specs(world.held_out_words if split == "held-out" else world.words)
    order = np.random.default_rng(len(specs)).permutation(len(specs))
    return [to_record(specs[i], "words", world) for i in order]


def objects(split: str, world: World = MINI) -> list[Record]:
    """Single objects, counts and positions in turn, so that any stretch of it holds the three equally."""
    kinds = [_split(specs, split) for specs in (world.attribute_specs(), world.count_specs(), world.position_specs())]
    longest = min(len(kinds[2]), 4 * len(kinds[0]))
    return [
        to_record(kind[i % len(kind)], "objects", world)
        for i in range(longest)
        for kind in kinds
        if i < len(kind) or split == "train"
    ]


second_places, second_words, second_objects = (
    functools.partial(source, world=MINI_B) for source in (places, words, objects)
)
"""The same of the second world."""
