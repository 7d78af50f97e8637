"""`marble compare`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from marble.errors import MarbleError

if TYPE_CHECKING:
    from marble.compare import Comparison

_DEFAULT_METHODS = ("marble", "weighted-sum", "ppo")
_DEFAULT_SEEDS = (0, 1, 2)
_OWN_CELLS = ("config", "methods", "seeds", "quick", "jobs", "threads")
"""What says nothing of runs that are finished."""
_INTERRUPTED = 130


@dataclass
class Compare:
    """Compare methods over seeds under one budget: a table, learning curves and a verdict with its uncertainty.

    Every cell, a method with a seed, is a run folder in DIR/cells, made by a process of its own. Finished cells are
    kept: the same command again goes on where it was interrupted and tries broken cells anew; later calls may add
    methods and seeds. DIR/comparison.json and DIR/comparison.html say what was found. `--section.setting VALUE`
    changes the configuration that all arms have in common, as in marble train.

    example: marble compare --methods marble weighted-sum ppo --seeds 0 1 2 --out runs/comparison
             marble compare my.yaml --methods marble "gentle=marble:balance.refresh=5" specialists --out runs/mine
             marble compare --runs runs/first runs/second --out runs/side-by-side
    """

    config: tyro.conf.Positional[Path | None] = None
    """a YAML file; that of the comparison in DIR, or else the demo's, if none is given, and settings are laid over
    that"""
    methods: tuple[str, ...] = ()
    """arms (marble list arms), each perhaps with settings: NAME=BASE:setting=value,…; all that are in DIR, or else
    marble, weighted-sum and ppo, if none are given"""
    seeds: tuple[int, ...] = ()
    """each method is trained with each; 0 1 2, if none are given"""
    quick: bool = False
    """one seed, unless --seeds says otherwise"""
    out: Path = Path("runs/comparison")
    """folder of the comparison, new or one to go on with"""
    jobs: int | None = None
    """cells at work side by side; one a GPU, or one for every THREADS cores, if not given"""
    threads: int | None = None
    """CPU threads of a cell; 1, or the cores' share of a GPU, if not given"""
    baseline: str | None = None
    """arm over which relative gains are taken; ppo, or else weighted-sum, if not given"""
    runs: tuple[Path, ...] = ()
    """compare these finished runs instead of making any"""
    json: Annotated[bool, tyro.conf.arg(help="print comparison.json")] = False


def run(argv: list[str]) -> int:
    """The command."""
    own, settings = split_settings(argv)
    args = tyro.cli(Compare, args=own, prog="marble compare")
    _check(args, settings)
    return _side_by_side(args) if args.runs else _make(args, settings)


def split_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and `--section.setting VALUE` pairs for the configuration.

    Raises:
        MarbleError: the seed is given as a setting.
    """
    from marble.config import Config

    plain = {*Config.model_fields} - {*Compare.__dataclass_fields__}
    own: list[str] = []
    settings: list[str] = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or not ("." in name or name[2:].replace("-", "_") in plain):
            own.append(argument)
            continue
        if name == "--seed":
            raise MarbleError("--seed: cells have the seeds that --seeds names")
        settings.append(argument)
        if not equals and arguments:
            settings.append(arguments.pop(0))
    return own, settings


def _check(args: Compare, settings: list[str]) -> None:
    for name in ("jobs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MarbleError(f"--{name}: at least 1, got {value}")
    if twice := sorted({seed for seed in args.seeds if args.seeds.count(seed) > 1}):
        raise MarbleError(f"--seeds: {', '.join(map(str, twice))} given more than once")
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2**31]:
        raise MarbleError(f"--seeds: from 0 to {2**31 - 1}, got {wrong[0]}")
    if not args.runs:
        return
    given = [f"--{name}" for name in _OWN_CELLS if getattr(args, name) != getattr(Compare, name)]
    if given := given + settings[:1]:
        raise MarbleError(f"--runs: compares runs as they were made; leave out {', '.join(given)}")
    if (args.out / "comparison.yaml").exists():
        raise MarbleError(f'--out: "{args.out}" holds a comparison of its own cells; name another folder')


def _side_by_side(args: Compare) -> int:
    from marble.compare import describe, side_by_side

    results, config = side_by_side(args.runs)
    content = describe(results, config, args.baseline)
    args.out.mkdir(parents=True, exist_ok=True)
    _tell(args, content)
    return 0


def _make(args: Compare, settings: list[str]) -> int:
    from marble.cli.comparing import Display
    from marble.compare import Crew, choose_place, describe, gather

    comparison, arms, seeds = _plan(args, settings)
    cells = comparison.add(arms, seeds) if arms else comparison.cells()
    _check_baseline(args, comparison)
    comparison.path.mkdir(parents=True, exist_ok=True)
    remarks = comparison.remarks()
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    place = choose_place(comparison.config, args.jobs, args.threads)
    with Crew(comparison.path, place) as crew:
        comparison.save()
        with Display(len(cells), place.jobs) as display:
            whole = crew.make(cells, display)
    content = describe(gather(comparison), comparison.config.model_dump(mode="json"), args.baseline, remarks)
    _tell(args, content)
    if not whole:
        print(f"interrupted; the same command goes on, or: marble compare --out {args.out}", file=sys.stderr)
        return _INTERRUPTED
    return 0 if all(cell.done and not cell.strayed() for cell in cells) else 1


def _plan(args: Compare, settings: list[str]) -> tuple[Comparison, list[Any], list[int]]:
    """The comparison, and the arms and seeds that this call asks for; no arms: all that it has already."""
    from marble.compare import Comparison, parse_arms
    from marble.config import demo_config_path, make_config, read_config
    from marble.overrides import override

    known = (args.out / "comparison.yaml").is_file()
    values = None
    if args.config is not None or settings or not known:
        remembered = known and args.config is None
        path = args.out if remembered else args.config or demo_config_path()
        given = Comparison.open(args.out, None).values if remembered else read_config(path)
        values = override(given, settings)
        make_config(values, str(path))
    comparison = Comparison.open(args.out, values)
    seeds = list(args.seeds) or ([0] if args.quick else list(_DEFAULT_SEEDS))
    if known and not (args.methods or args.seeds or args.quick):
        return comparison, [], []
    labels = [term.label for term in comparison.config.rewards]
    if args.methods or not known:
        return comparison, parse_arms(args.methods or _DEFAULT_METHODS, labels), seeds
    return comparison, list(comparison.arms.values()), seeds


def _check_baseline(args: Compare, comparison: Comparison) -> None:
    from marble.errors import nearest

    if args.baseline is not None and args.baseline not in comparison.arms:
        raise MarbleError(
            f'--baseline: "{args.baseline}" is not an arm of this comparison.'
            f"{nearest(args.baseline, comparison.arms)} It has: {', '.join(comparison.arms)}"
        )


def _tell(args: Compare, content: dict[str, Any]) -> None:
    """Write what was found, and show it."""
    from marble.cli.comparing import show
    from marble.compare import write_comparison, write_page

    file, page = write_comparison(args.out, content), write_page(args.out, content)
    if args.json:
        print(json.dumps(content))
        return
    show(content)
    print(f"\npage: {page}\ndata: {file}")
