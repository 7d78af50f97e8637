"""`marble bench`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from marble.errors import MarbleError, nearest


@dataclass
class Bench:
    """Measure an update's speed and memory: weighted sum, exact by the engine, exact by K backwards, amortised.

    Arms run in turn in one process, so that their ratios hold on a busy machine. `mini` is measured over whole epochs,
    rollout and rewards included, on the CPU as the demo trains it; the other shapes have random weights and are
    measured over the update phase. `marble bench scale` predicts what a run costs on many GPUs.

    example: marble bench sd3-small --rewards 5 20 --json bench.json
    """

    shape: tyro.conf.Positional[str] = "mini"
    """mini, or one of those of marble bench --list"""
    list: bool = False
    """show the shapes"""
    rewards: tuple[int, ...] = (5, 20)
    """numbers of rewards K to measure at"""
    batch: int | None = None
    """images in a batch; the shape's own, if not given"""
    rank: int = 32
    """of the LoRA"""
    checkpointing: bool = False
    """recompute activations on the way back"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: frozen weights in bfloat16, under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where"""
    repeats: int = 7
    """rounds"""
    slow: bool = True
    """measure K backward passes too"""
    threads: int | None = None
    """CPU threads; as torch chooses, if not given"""
    json: Path | None = None
    """write everything measured to this file"""


def run(argv: list[str]) -> int:
    """The command."""
    if argv[:1] == ["scale"]:
        from marble.cli import scale

        return scale.run(argv[1:])
    args = tyro.cli(Bench, args=argv, prog="marble bench")
    for library in ("KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL"):  # read when torch is imported: the profiler talks
        os.environ.setdefault(library, "99" if library.startswith("KINETO") else "ERROR")
    from marble.bench.shapes import SHAPES

    if args.list:
        names = {"mini": "the embedded model, whole epochs", **{n: s.about for n, s in SHAPES.items()}}
        print("\n".join(f"{name:<12}  {about}" for name, about in names.items()))
        return 0
    _check(args, SHAPES)
    for content in _measure(args):  # what there is so far
        if args.json is not None:
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(args: Bench, shapes: dict[str, Any]) -> None:
    if args.shape != "mini" and args.shape not in shapes:
        known = ["mini", "scale", *shapes]
        raise MarbleError(f'no shape "{args.shape}".{nearest(args.shape, known)} Known: {", ".join(known)}')
    for name in (
        ("rewards", "batch", "rank", "checkpointing", "dtype", "device", "slow") if args.shape == "mini" else ()
    ):
        if getattr(args, name) != getattr(Bench, name):
            raise MarbleError(f"--{name}: mini is measured as the demo trains it; leave it out or name another shape")
    for name in ("repeats", "rank", "batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MarbleError(f"--{name}: at least 1, got {value}")
    if not args.rewards or min(args.rewards) < 1:
        raise MarbleError(f"--rewards: numbers of at least 1, got {list(args.rewards)}")
    if args.json is not None and args.json.is_dir():
        raise MarbleError(f'--json: "{args.json}" is a folder; name a file')
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise MarbleError(f'--json: there is no folder "{args.json.parent}"')
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise MarbleError("--device: cuda asks for a GPU, and torch sees none")


def _measure(args: Bench) -> Iterator[dict[str, Any]]:
    import platform

    import torch

    from marble.bench import SHAPES, bench_epoch, bench_update

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    content: dict[str, Any] = {"shape": args.shape, "device": device, "threads": torch.get_num_threads()}
    content["torch"] = torch.__version__
    print(f"{args.shape} on {device}, {content['threads']} threads, torch {torch.__version__}")
    if args.shape == "mini":
        content["epoch"] = bench_epoch(repeats=args.repeats)
        _print_epoch(content["epoch"])
        yield content
        return
    content["update"] = []
    for count in args.rewards:
        result = bench_update(
            SHAPES[args.shape],
            rewards=count,
            batch=args.batch,
            rank=args.rank,
            checkpointing=args.checkpointing,
            dtype=args.dtype,
            device=args.device,
            repeats=args.repeats,
            slow=args.slow,
        )
        content["update"].append(result)
        _print_update(result)
        yield content


def _print_epoch(result: dict[str, Any]) -> None:
    print(f"whole epochs of {result['images']} images, 5 rewards, median of {result['repeats']} rounds")
    rows: list[tuple[str, ...]] = [("", "s an epoch", "speed against the weighted sum")]
    for name, row in result["arms"].items():
        rows.append((name, _number(row["seconds"], 2), _number(row["speed"], 3)))
    print_table(rows)
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["phases"].items())
    print(f"seconds of a weighted-sum epoch: {phases}")


def _print_update(result: dict[str, Any]) -> None:
    checkpointing = ", checkpointing" if result["checkpointing"] else ""
    print(
        f"\nupdate phase, N={result['batch']}, K={result['rewards']}, rank {result['rank']}, {result['dtype']}"
        f"{checkpointing}, {result['parameters']:,} parameters, median of {result['repeats']} rounds"
    )
    base = result["arms"]["weighted sum"]["peak_bytes"]
    rows: list[tuple[str, ...]] = [("", "s an update", "against the weighted sum", "peak of tensors")]
    for name, row in result["arms"].items():
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB, {row['peak_bytes'] / base:.3f}×" if "peak_bytes" in row else ""
        rows.append((name, _number(row["seconds"], 3), _number(row["against_weighted_sum"], 3) + "×", peak))
    print_table(rows)
    print(
        f"exact over the floor of two plain backwards {_number(result['over_floor'], 3)}; the engine's share of an "
        f"exact update {100 * result['engine_share']['median']:.1f}%; relative error of its gradients "
        f"{result['error']:.1e}; {100 * result['fast_share']:.0f}% of the parameters on the fast path"
    )


def _number(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
