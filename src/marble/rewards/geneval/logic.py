"""What GenEval makes of detections: right or not, and how nearly.

Sources: `evaluate` of github.com/djghosh13/geneval, `evaluation/evaluate_images.py` (accuracy), and `evaluate_reward`
of github.com/yifan123/reward-server, `reward_server/gen_eval.py` (partial credit, strict accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marble.prompts.coco import COLOURS, NAMES, RELATIONS

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels from the left upper corner; x1 and y1 are the first beyond."""


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, of a colour if one is given."""

    name: str
    count: int
    colour: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for."""

    objects: tuple[Clause, ...]
    relation: tuple[str, int, int] | None = None
    """Of object i to object j."""
    exclude: tuple[Clause, ...] = ()
    """So many or more of a class are too many."""
    counting: bool = False

    @classmethod
    def of(cls, targets: Mapping[str, Any]) -> Asked | None:
        """What a record's targets ask for; none if they are not of the form or ask for what GenEval does not know."""
        objects, exclude = _clauses(targets.get("objects")), _clauses(targets.get("exclude", []))
        relation = targets.get("relation")
        if not objects or exclude is None:
            return None
        if relation is not None:
            if not isinstance(relation, list | tuple) or len(relation) != 3 or relation[0] not in RELATIONS:
                return None
            places = relation[1:]
            if not all(_whole(place, 0) and place < len(objects) for place in places) or places[0] == places[1]:
                return None
        return cls(objects, relation and tuple(relation), exclude, targets.get("task") == "counting")  # type: ignore[arg-type]

    @property
    def order(self) -> list[int]:
        """The objects, the one that must stand somewhere last: whether it does depends on the other."""
        last = self.relation[1] if self.relation else -1
        return sorted(range(len(self.objects)), key=lambda i: i == last)


@dataclass(frozen=True)
class Found:
    """An object that was found."""

    box: Box
    colour: str | None = None
    """None if nobody had to know."""


@dataclass(frozen=True)
class Verdict:
    """What three scores say of one image."""

    accuracy: float
    """1 if all is right, as the benchmark counts it, else 0."""
    strict: float
    """1 if all is right and nothing wanted is there too often, else 0."""
    credit: float
    """Mean of the terms of partial credit: at most 1, below 0 where far too many are found."""
    published_credit: float
    """The same with the slip of the published code."""


def decide(wanted: Asked, found: Mapping[str, Sequence[Found]], margin: float) -> Verdict:
    """Judge one image.

    Args:
        wanted: what should be there.
        found: what was found of each class, best first, the first `count` of a class with their colours wherever
            `wanted` gives one and so many are found.
        margin: share of two boxes' sizes by which their centres must be apart to count as beside each other.
    """
    strict, terms, surplus = _partial(wanted, found, margin)
    # the published code counts a wrong position as 0 and then also as 1
    published = [*terms, *[1.0] * surplus]
    return Verdict(
        accuracy=float(_right(wanted, found, margin)),
        strict=float(strict),
        credit=sum(terms) / len(terms),
        published_credit=sum(published) / len(published),
    )


def _right(wanted: Asked, found: Mapping[str, Sequence[Found]], margin: float) -> bool:
    """Accuracy: of each class the best `count` alone are looked at."""
    groups: dict[int, Sequence[Found]] = {}
    for i in wanted.order:
        clause = wanted.objects[i]
        best = found.get(clause.name, ())[: clause.count]
        if len(best) < clause.count or (clause.colour and any(one.colour != clause.colour for one in best)):
            return False
        if wanted.relation and wanted.relation[1] == i:
            relation, _, j = wanted.relation
            if not _all_stand(best, groups[j], relation, margin):
                return False
        groups[i] = best
    return not any(len(found.get(clause.name, ())) >= clause.count for clause in wanted.exclude)


def _partial(wanted: Asked, found: Mapping[str, Sequence[Found]], margin: float) -> tuple[bool, list[float], int]:
    """Whether it is strictly right, the terms of partial credit, and wrong positions; all that was found counts."""
    terms: list[float] = []
    groups: dict[int, Sequence[Found]] = {}
    misplaced = 0
    for i in wanted.order:
        clause, placed = wanted.objects[i], wanted.relation is not None and wanted.relation[1] == i
        all_found = found.get(clause.name, ())
        terms.append(1 - abs(clause.count - len(all_found)) / clause.count)
        if len(all_found) != clause.count:
            if clause.colour or placed:
                terms.append(0.0)
            continue
        if clause.colour:
            right = sum(one.colour == clause.colour for one in all_found)
            terms.append(right / clause.count)
            if right != clause.count:
                continue
        if placed:
            assert wanted.relation is not None
            relation, _, j = wanted.relation
            stands = j in groups and _all_stand(all_found, groups[j], relation, margin)
            terms.append(float(stands))
            misplaced += j in groups and not stands
            if not stands:
                continue
        groups[i] = all_found
    return len(groups) == len(wanted.objects), terms, misplaced


def relations(one: Box, two: Box, margin: float) -> set[str]:
    """How `one` stands to `two`: none, one or two of GenEval's four relations.

    The offset of their centres is lessened along each axis by `margin` times the sum of their sizes, and what is left
    must be more than half of the whole offset's length.
    """
    offset = [(one[k] + one[k + 2] - two[k] - two[k + 2]) / 2 for k in (0, 1)]
    sizes = [abs(one[k + 2] - one[k]) + abs(two[k + 2] - two[k]) for k in (0, 1)]
    left = [math.copysign(max(abs(o) - margin * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if all(abs(rest) < 1e-3 for rest in left):
        return set()
    dx, dy = (rest / math.hypot(*offset) for rest in left)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, does in holds.items() if does}


def _all_stand(these: Sequence[Found], those: Sequence[Found], relation: str, margin: float) -> bool:
    return all(relation in relations(one.box, two.box, margin) for one in these for two in those)


def _clauses(rows: Any) -> tuple[Clause, ...] | None:
    if not isinstance(rows, list | tuple):
        return None
    clauses = []
    for row in rows:
        if not isinstance(row, Mapping):
            return None
        name, count, colour = row.get("name"), row.get("count", 1), row.get("colour")
        if name not in NAMES or not _whole(count, 1) or (colour is not None and colour not in COLOURS):
            return None
        clauses.append(Clause(name, count, colour))
    return tuple(clauses)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
