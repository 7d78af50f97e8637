"""The words of GenEval: COCO's 80 classes, ten colours, four relations, and its metadata as our targets.

Source: Ghosh et al. 2023, "GenEval", github.com/djghosh13/geneval, `evaluation/object_names.txt` and
`prompts/create_prompts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marble.errors import MarbleError, nearest

# in COCO's own order, so that place n is a detector's class n; three names are longer than COCO's
NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
"""The 80 classes as GenEval calls them: COCO's mouse, remote and keyboard say what they belong to."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tags."""


def targets_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A line of GenEval's `evaluation_metadata.jsonl` as the targets of a record.

    Args:
        metadata: `{"tag", "include": [{"class", "count", "color", "position": [relation, j]}], "exclude": [{"class",
            "count"}]}`; colour, position and exclude are optional, clause j stands before the one that names it. Other
            keys (`prompt`) are passed over.

    Returns:
        `{"task", "objects": [{"name", "count", "colour"}], "relation": [relation, i, j], "exclude": [{"name",
        "count"}]}`: object i stands `relation` object j; what the line lacks is left out.

    Raises:
        MarbleError: the line is not of that form, names what GenEval does not know, or has more than one position.
    """
    if not isinstance(metadata, Mapping):
        raise MarbleError(f"GenEval metadata: must be an object, got {metadata!r}")
    targets: dict[str, Any] = {"task": _known(metadata.get("tag"), TASKS, "tag")}
    include = _clauses(metadata, "include", ("class", "count", "color", "position"))
    if not include:
        raise MarbleError("GenEval metadata: include must name at least one object, got none")
    targets["objects"] = []
    for i, clause in enumerate(include):
        thing = _counted(clause, f"include[{i}]")
        if "color" in clause:
            thing["colour"] = _known(clause["color"], COLOURS, f"include[{i}].color")
        if "position" in clause:
            if "relation" in targets:
                raise MarbleError(f"GenEval metadata: include[{i}].position is a second one; a prompt can have one")
            targets["relation"] = _relation(clause["position"], i)
        targets["objects"].append(thing)
    exclude = _clauses(metadata, "exclude", ("class", "count"))
    if exclude:
        targets["exclude"] = [_counted(clause, f"exclude[{i}]") for i, clause in enumerate(exclude)]
    return targets


def _clauses(metadata: Mapping[str, Any], field: str, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    clauses = metadata.get(field, [])
    if not isinstance(clauses, list) or not all(isinstance(clause, Mapping) for clause in clauses):
        raise MarbleError(f"GenEval metadata: {field} must be a list of objects, got {clauses!r}")
    for i, clause in enumerate(clauses):
        if unknown := [key for key in clause if key not in keys]:  # a demand that nobody would check
            raise MarbleError(
                f'GenEval metadata: {field}[{i}] has an unknown key "{unknown[0]}"; known: {", ".join(keys)}'
            )
    return clauses


def _counted(clause: Mapping[str, Any], field: str) -> dict[str, Any]:
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise MarbleError(f"GenEval metadata: {field}.count must be a whole number of at least 1, got {count!r}")
    return {"name": _known(clause.get("class"), NAMES, f"{field}.class"), "count": count}


def _relation(position: Any, i: int) -> list[Any]:
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise MarbleError(f"GenEval metadata: include[{i}].position must be [relation, clause], got {position!r}")
    relation, j = position
    if not isinstance(j, int) or isinstance(j, bool) or not 0 <= j < i:
        raise MarbleError(f"GenEval metadata: include[{i}].position must name a clause before its own, got {j!r}")
    return [_known(relation, RELATIONS, f"include[{i}].position"), i, j]


def _known(value: Any, known: Sequence[str], field: str) -> str:
    if value not in known:
        raise MarbleError(
            f'GenEval metadata: {field} must be one of GenEval\'s {len(known)}, got "{value}".'
            f"{nearest(str(value), known)}"
        )
    return str(value)
