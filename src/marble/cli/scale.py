"""`marble bench scale`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from marble.errors import MarbleError, nearest

_LATENCIES = ("inside_latency", "between_latency", "inside_tree", "between_tree")
_CONSTANTS = ("flops", "update", "exact", "reward", "gram", "disk", "gpus", "inside", "between", *_LATENCIES)
_AT_LEAST_0 = ("reward", *_LATENCIES)
CHECKED = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)
"""Sizes P of a check; the line is fitted to the first, third and fifth of them."""
_MEASURED = {"cpu": ("sd3-small", "fp32"), "cuda": ("sd35-medium", "bf16")}
"""By device: the shape that `--measure` runs, and how."""
_DISK = 2**28
"""Bytes written to measure the disk."""


@dataclass
class Scale:
    """Predict what a run costs on 8 to 4096 GPUs: bytes, seconds, memory, idle shares, checkpoints.

    A model of a few formulas (docs/scaling.md). Its constants are published figures, assumptions, measurements on
    this machine (--measure) or given; the table says which is which.

    example: marble bench scale --parameters 18776064 --rewards 5 20 --json scale.json
    """

    shape: tyro.conf.Positional[str] = "sd35-medium"
    """one of those of marble bench --list, without mini"""
    rank: int = 32
    """of the LoRA"""
    parameters: int | None = None
    """trained numbers P; those of a LoRA on all attention layers, if not given"""
    rewards: tuple[int, ...] = (5, 20)
    """numbers of rewards K, a table for each"""
    prompts: int = 48
    """of an epoch"""
    group_size: int = 24
    """images of a prompt"""
    steps: int = 10
    """forward passes that sample an image; twice the sampling steps under guidance"""
    timesteps: int = 9
    """trained, of each image"""
    updates: int = 1
    """of an epoch"""
    refresh: int = 1
    """one update in so many has exact gradients"""
    processes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    """numbers of GPUs W"""
    flops: float | None = None
    """operations a second that a forward pass attains"""
    update: float | None = None
    """a plain update's time over a forward pass's"""
    exact: float | None = None
    """an exact update's time over a plain one's"""
    reward: float | None = None
    """seconds of one reward for one image"""
    gram: float | None = None
    """bytes of rows a second that go into a Gram"""
    disk: float | None = None
    """bytes written a second"""
    gpus: int | None = None
    """of a node"""
    inside: float | None = None
    """bytes a second that a GPU sends within its node"""
    between: float | None = None
    """bytes a second that a GPU sends to other nodes"""
    inside_latency: float | None = None
    """seconds of a ring's step within a node"""
    between_latency: float | None = None
    """seconds of a ring's step between nodes"""
    inside_tree: float | None = None
    """seconds of a tree's step within a node"""
    between_tree: float | None = None
    """seconds of a tree's step between nodes"""
    measure: Literal["no", "cpu", "cuda"] = "no"
    """measure flops, update, exact, gram and disk on this machine (half a minute), instead of the defaults"""
    check: tuple[int, ...] = ()
    """also hold bytes and seconds of a solve's messages against so many processes on this machine, over gloo"""
    json: Path | None = None
    """write everything to this file"""


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Scale, args=argv, prog="marble bench scale")
    _check(args)
    for library in ("KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(library, "99" if library.startswith("KINETO") else "ERROR")
    from marble.bench.scale import Work, constants, model_of, table
    from marble.bench.shapes import SHAPES

    if args.shape not in SHAPES:
        raise MarbleError(f'no shape "{args.shape}".{nearest(args.shape, list(SHAPES))} Known: {", ".join(SHAPES)}')
    model = model_of(SHAPES[args.shape], args.rank, args.parameters)
    given = {name: getattr(args, name) for name in _CONSTANTS if getattr(args, name) is not None}
    content: dict[str, Any] = {"shape": args.shape, "tables": []}
    print(
        f"{args.shape}: P = {model.parameters:,} trained of {model.base:,}, {model.flops / 1e12:.3g} TFLOP a forward "
        f"pass\n{args.prompts} prompts x {args.group_size} images, {args.steps} forward passes to sample, "
        f"{args.timesteps} trained timesteps, {args.updates} updates an epoch, 1 in {args.refresh} exact"
    )
    for count in args.rewards:
        work = Work(count, args.prompts, args.group_size, args.steps, args.timesteps, args.updates, args.refresh)
        measured, where = _measure(args.measure, count) if args.measure != "no" else ({}, "")
        result = table(model, work, constants(given, measured, where), args.processes)
        content["tables"].append(result)
        _print(result)
    if args.check:
        content["check"] = [_checked(count, args.rewards) for count in args.check]
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(args: Scale) -> None:
    counts = ("rank", "parameters", "prompts", "group_size", "steps", "timesteps", "updates", "refresh")
    for name in (*counts, *_CONSTANTS):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is None:
            continue
        if name in (*counts, "gpus") and value < 1:
            raise MarbleError(f"{flag}: at least 1, got {value}")
        if name in _AT_LEAST_0 and not 0 <= value < float("inf"):
            raise MarbleError(f"{flag}: a number of at least 0, got {value}")
        if name not in _AT_LEAST_0 and not 0 < value < float("inf"):
            raise MarbleError(f"{flag}: a number above 0, got {value}")
    for name in ("rewards", "processes", "check"):
        values = getattr(args, name)
        if (not values and name != "check") or any(value < 1 for value in values):
            raise MarbleError(f"--{name}: numbers of at least 1, got {list(values)}")
    if args.json is not None and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        raise MarbleError(f'--json: "{args.json}" must be a file in a folder that there is')
    if args.measure == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise MarbleError("--measure: cuda asks for a GPU, and torch sees none")


def _measure(device: str, rewards: int) -> tuple[dict[str, float], str]:
    """Constants of this machine, and what was run for them."""
    import torch

    from marble.bench.measure import interleaved, summary
    from marble.bench.scale import NUMBER, model_of
    from marble.bench.shapes import SHAPES
    from marble.bench.update import Phase
    from marble.gradients import gram_of

    name, dtype = _MEASURED[device]
    shape = SHAPES[name]
    options: dict[str, Any] = {"rank": 32, "checkpointing": False, "dtype": dtype, "device": device}
    phase = Phase(shape, batch=shape.batch, rewards=rewards, **options)
    rows = torch.randn(rewards + 1, 2**22, device=device)

    def forward() -> None:
        with torch.no_grad():
            phase._predict()

    arms = {"forward": forward, "plain": phase.weighted_sum, "exact": phase.exact, "gram": lambda: gram_of(rows)}
    began = time.perf_counter()
    for arm in arms.values():
        arm()
    rounds = max(3, min(40, round(2 / (time.perf_counter() - began))))  # short ones are easily disturbed
    seconds = {arm: summary(values)["median"] for arm, values in interleaved(arms, rounds, phase.device).items()}
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        data, began = os.urandom(_DISK), time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
    found = {
        "flops": model_of(shape, 32).flops * shape.batch / seconds["forward"],
        "update": seconds["plain"] / seconds["forward"],
        "exact": seconds["exact"] / seconds["plain"],
        "gram": NUMBER * rows.numel() / seconds["gram"],
        "disk": _DISK / written,
    }
    return found, f"here, {name} {dtype} on {device}, K={rewards}, {torch.get_num_threads()} threads"


def _print(result: dict[str, Any]) -> None:
    from marble.cli.bench import print_table

    print(f"\nK = {result['work']['rewards']}, constants:")
    numbers, sources = result["constants"], result["constants"]["sources"]
    print_table([(f"  {name}", f"{numbers[name]:.4g}", source) for name, source in sources.items()])
    ways = {name: [row["ways"][name] for row in result["rows"]] for name in ("whole", "scattered", "gradient")}
    rows, aside = result["rows"], [row["aside"] for row in result["rows"]]
    counts = [str(row["processes"]) for row in rows]
    print("one epoch, rewards in every process; and with reward processes of their own out of the same W:")
    _columns(
        {
            "W": counts,
            "prompts": [f"{row['prompts']}{'*' if row['refused'] else ''}" for row in rows],
            "images": [str(row["images"]) for row in rows],
            "idle": [f"{100 * row['idle']:.0f}%" for row in rows],
            "s": [f"{row['seconds']['epoch']:.2f}" for row in rows],
            **{name: [f"{row['seconds'][name]:.2f}" for row in rows] for name in ("rollout", "rewards", "update")},
            "images/s": [f"{row['images_per_second']:.0f}" for row in rows],
            "efficiency": [f"{row['efficiency']:.3f}" for row in rows],
            "reward processes": [str(each["reward_processes"]) for each in aside],
            "s an epoch": [_or_dash(each["epoch_seconds"]) for each in aside],
        }
    )
    print("\na solve in one process: all rows to all (w), or scattered (s); an ordinary update's gradient (g):")
    _columns(
        {
            "W": counts,
            **{f"sent, {name[0]}": [_size(way["sent_bytes"]) for way in each] for name, each in ways.items()},
            **{f"ms, {name[0]}": [f"{1e3 * way['seconds']:.2f}" for way in each] for name, each in ways.items()},
            **{
                f"of the epoch, {name[0]}": [f"{100 * way['share']:.3f}%" for way in each]
                for name, each in ways.items()
            },
            "rows, w": [_size(way["peak_bytes"]) for way in ways["whole"]],
            "rows, s": [_size(way["peak_bytes"]) for way in ways["scattered"]],
            "summed, s": [_size(way["left_bytes"]) for way in ways["scattered"]],
        }
    )
    if any(row["refused"] for row in result["rows"]):
        print("* more processes than prompts: refused as it is; reckoned with a prompt for each")
    row = result["rows"][0]
    keeps_up = row["aside"]["rollout_processes_a_reward_process"]
    if keeps_up is not None:
        print(f"one reward process keeps up with {keeps_up:.2f} that sample")
    print(
        f"checkpoint {_size(row['checkpoint']['bytes'])}, {row['checkpoint']['seconds']:.2f} s; weights and optimiser "
        f"{_size(row['weights_bytes'])} in each process"
    )


def _checked(processes: int, rewards: tuple[int, ...]) -> dict[str, Any]:
    """Measured beside predicted, and printed."""
    from marble.bench.simulate import check, simulate

    timed = 1 < processes <= (os.cpu_count() or 1)  # with fewer cores than processes, only bytes say much
    chosen = CHECKED if timed else CHECKED[:4]
    results = simulate(processes, [(parameters, count + 1) for count in rewards for parameters in chosen])
    fitted = set(chosen[:5:2])
    checked: list[dict[str, Any]] = []
    for count in rewards:  # a line for each, since gloo's speed depends on more than bytes
        own = [result for result in results if result["rows"] == count + 1]
        checked += check(own, lambda result: result["parameters"] in fitted)
    print(f"\n{processes} processes over gloo on this machine")
    _columns(
        {
            "way": [line["way"] for line in checked],
            "P": [str(line["parameters"]) for line in checked],
            "K": [str(line["rows"] - 1) for line in checked],
            "bytes": [str(line["handed_bytes"]) for line in checked],
            "predicted": [str(line["predicted_bytes"]) for line in checked],
            "ms": [f"{1e3 * line['message_seconds']:.2f}" for line in checked],
            "by the line": [f"{1e3 * line['predicted_seconds']:.2f}" for line in checked],
            "error": [f"{100 * line['error']:+.0f}%" for line in checked],
            "": ["fitted" if line["fitted"] else "" for line in checked],
        }
    )
    print("\nGram and direction included; memory taken beyond the rows; how far the two ways' results are apart:")
    ways = {name: [result["ways"][name] for result in results] for name in ("whole", "scattered")}
    _columns(
        {
            "P": [str(result["parameters"]) for result in results],
            "K": [str(result["rows"] - 1) for result in results],
            **{f"ms, {name}": [f"{1e3 * way['seconds']:.1f}" for way in each] for name, each in ways.items()},
            **{
                f"beyond, {name}": ["" if way["extra_bytes"] is None else _size(way["extra_bytes"]) for way in each]
                for name, each in ways.items()
            },
            "apart": [f"{result['error']:.0e}" for result in results],
        }
    )
    return {"processes": processes, "messages": checked, "solves": results}


def _columns(columns: dict[str, list[str]]) -> None:
    from marble.cli.bench import print_table

    print_table([tuple(columns), *zip(*columns.values(), strict=True)])


def _or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _size(count: float) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"
