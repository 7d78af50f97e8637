"""`marble mini pretrain`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from marble.errors import MarbleError, nearest


@dataclass
class Pretrain:
    """Make the embedded model and its judges from scratch: one to two hours on two cores.

    Interrupted, the same command goes on where it was. The shipped weights are those of seed 0.

    example: marble mini pretrain --seed 0 --out my-mini
    """

    out: Path
    """folder for `model/` (a Diffusers pipeline) and `judges/`; `work/` in it holds what a resumed run needs"""
    seed: int = 0
    only: Literal["model", "judges"] | None = None
    """make one of the two only"""
    scale: float = 1.0
    """share of the full number of training steps and pictures, to try it out"""


def run(argv: list[str]) -> int:
    """The command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: marble mini pretrain --out DIR [--seed 0] …        marble mini pretrain --help")
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
    from marble.mini.world import MINI

    if args.only != "model":
        folder = args.out / "judges"
        folder.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            path = folder / f"{kind}.safetensors"
            if not path.exists():
                train_judge(MINI, kind, args.seed, path, scale=args.scale)
    if args.only != "judges":
        pretrain(MINI, Recipe(seed=args.seed).scaled(args.scale), args.out / "work", args.out / "model")
    print(f"made {args.out}", file=sys.stderr)
    return 0
