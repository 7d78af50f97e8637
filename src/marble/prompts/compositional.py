"""Compositional prompts in GenEval's six tasks, for training on GenEval and for measuring it on prompts held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations, permutations, product
from typing import Any

from marble.errors import MarbleError
from marble.prompts.coco import COLOURS, NAMES, RELATIONS
from marble.prompts.record import Record

TRAIN = 1000
"""Train records of a task. single_object, counting and colors have fewer texts (40, 200, 750) and repeat them."""
HELD_OUT = 40
"""Held-out records of a task, all different: half of the 80 single objects."""
NUMBERS = {2: "two", 3: "three", 4: "four"}

_COLOURABLE = tuple(name for name in NAMES if name != "person")
_TWO_COLOURS = tuple(permutations(COLOURS, 2))


def compositional(split: str) -> list[Record]:
    """6000 train or 240 held-out prompts with their targets, the six tasks in turn, so that any stretch holds all six.

    Texts are in the form of GenEval's `prompts/create_prompts.py`, its plurals included. What is held out is held out
    by what a prompt is about, before any text is made: a class for single objects, a class with its number for
    counting, a class with its colour for colours, and an unordered pair of classes for two objects, position and
    attribution. So no held-out pair stands in a train prompt of the same task, in whatever order, relation or colours;
    and since every task has its own form of text, no text stands in both splits.

    These are not the benchmark's 553 prompts, but a train prompt may also be one of them: leave those out before you
    report a score on the benchmark.

    Args:
        split: `train` or `held-out`.

    Raises:
        MarbleError: another split.
    """
    if split not in ("train", "held-out"):
        raise MarbleError(f'prompt source "compositional": the split must be train or held-out, got "{split}"')
    pairs, colourable = list(combinations(NAMES, 2)), list(combinations(_COLOURABLE, 2))
    tasks = [
        [_single(name) for name in _part(NAMES, "single_object", split)],
        [_two(*_turned(pair, "two_object")) for pair in _part(pairs, "two_object", split)],
        [_counting(*what) for what in _part(list(product(NAMES, NUMBERS)), "counting", split)],
        [_coloured(*what) for what in _part(list(product(COLOURS, _COLOURABLE)), "colors", split)],
        [
            _position(*_turned(pair, "position"), _choice(RELATIONS, pair, "relation"))
            for pair in _part(pairs, "position", split)
        ],
        [
            _attribution(*_turned(pair, "color_attr"), *_choice(_TWO_COLOURS, pair, "colours"))
            for pair in _part(colourable, "color_attr", split)
        ],
    ]
    count = HELD_OUT if split == "held-out" else TRAIN
    return [task[i % len(task)] for i in range(count) for task in tasks]


def with_article(name: str) -> str:
    """`a bench`, `an apple`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """`benchs`, `buses`: GenEval's rule, right or wrong."""
    return name + ("es" if name.endswith("s") else "s")


def _number(*what: Any) -> int:
    """A number that depends on `what` alone, on every machine and in every version of a library."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")


def _part(items: Sequence[Any], task: str, split: str) -> list[Any]:
    order = sorted(items, key=lambda item: _number(task, item))
    return order[:HELD_OUT] if split == "held-out" else order[HELD_OUT : HELD_OUT + TRAIN]


def _turned(pair: tuple[str, str], task: str) -> tuple[str, str]:
    return pair if _number("turn", task, pair) % 2 else (pair[1], pair[0])


def _choice(options: Sequence[Any], pair: tuple[str, str], what: str) -> Any:
    return options[_number(what, pair) % len(options)]


def _record(text: str, task: str, objects: list[dict[str, Any]], **more: Any) -> Record:
    return Record(f"a photo of {text}", "compositional", {"task": task, "objects": objects, **more})


def _single(name: str) -> Record:
    return _record(with_article(name), "single_object", [{"name": name, "count": 1}])


def _two(one: str, two: str) -> Record:
    objects = [{"name": one, "count": 1}, {"name": two, "count": 1}]
    return _record(f"{with_article(one)} and {with_article(two)}", "two_object", objects)


def _counting(name: str, count: int) -> Record:
    more = [{"name": name, "count": count + 1}]
    return _record(f"{NUMBERS[count]} {plural(name)}", "counting", [{"name": name, "count": count}], exclude=more)


def _coloured(colour: str, name: str) -> Record:
    return _record(f"{with_article(colour)} {name}", "colors", [{"name": name, "count": 1, "colour": colour}])


def _position(one: str, two: str, relation: str) -> Record:
    objects = [{"name": two, "count": 1}, {"name": one, "count": 1}]  # what the other stands by comes first
    text = f"{with_article(one)} {relation} {with_article(two)}"
    return _record(text, "position", objects, relation=[relation, 1, 0])


def _attribution(one: str, two: str, first: str, second: str) -> Record:
    objects = [{"name": one, "count": 1, "colour": first}, {"name": two, "count": 1, "colour": second}]
    return _record(f"{with_article(first)} {one} and {with_article(second)} {two}", "color_attr", objects)
