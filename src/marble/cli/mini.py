"""`marble mini pretrain`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from marble.errors import MarbleError, nearest


@dataclass
class Pretrain:
    """Make the embedded model and its judges from scratch: one to two hours on two cores.

    Interrupted, the same command goes on where it was. The shipped weights are those of seed 0.

    example: marble mini pretrain --seed 0 --out my-mini
    """

    out: Path = Path("mini")
    """folder for `model/` (a Diffusers pipeline) and `judges/`; `work/` in it holds what a resumed run needs"""
    world: Literal["mini", "mini-b"] = "mini"
    """whose pictures it learns from"""
    seed: int = 0
    only: Literal["model", "judges"] | None = None
    """make one of the two only"""
    scale: float = 1.0
    """share of the full number of training steps and pictures, to try it out"""


def run(argv: list[str]) -> int:
    """The command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: marble mini pretrain [--seed 0] [--out DIR] …        marble mini pretrain --help\n\n"
            "Make the embedded model and its judges from scratch.\n\n"
            "example: marble mini pretrain --seed 0 --out my-mini"
        )
        return 0
    if argv[0] != "pretrain":
        raise MarbleError(f'unknown command "mini {argv[0]}".{nearest(argv[0], ["pretrain"])} Known: pretrain')
    args = tyro.cli(Pretrain, args=argv[1:], prog="marble mini pretrain")
    if not 0 < args.scale <= 1:
        raise MarbleError(f"--scale: must be above 0 and at most 1, got {args.scale}")
    if args.seed < 0:
        raise MarbleError(f"--seed: must not be negative, got {args.seed}")
    from marble.mini.judges import KINDS, train_judge
    from marble.mini.pretrain import Recipe, pretrain
    from marble.mini.world import WORLDS

    world = WORLDS[args.world]
    recipe = Recipe(seed=args.seed).scaled(args.scale)
    _remember(args.out, {"world": world.revision, "recipe": asdict(recipe), "scale": args.scale})
    if args.only != "model":
        folder = args.out / "judges"
        folder.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            path = folder / f"{kind}.safetensors"
            if not path.exists():
                train_judge(world, kind, args.seed, path, scale=args.scale)
    if args.only != "judges":
        pretrain(world, recipe, args.out / "work", args.out / "model")
    print(f"made {args.out}", file=sys.stderr)
    return 0


def _remember(folder: Path, content: dict[str, Any]) -> None:
    """Write down what is being made, or refuse to go on with something else's half-made files."""
    from marble.storage import write_atomic

    path = folder / "recipe.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != content:
            raise MarbleError(
                f'--out: "{folder}" holds a model of another world, seed, scale or recipe; choose another folder'
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2))
