"""What a run would cost on W processes: a model of bytes, seconds and memory, from a few constants.

    epoch = n (rollout + K reward) + n T visit (1 + (exact - 1) / refresh) + updates (messages + Gram)

n: images of the process that has most, T: trained timesteps. Nothing here talks to another process; `simulate.py`
holds the bytes against real messages, and the form of the times against measured ones.

Messages follow the formulas by which NCCL's own tuner predicts them (NVIDIA/nccl, src/graph/tuning.cc at 01afd20):

    ring: steps inside a node * latency + steps between nodes * latency + sent bytes / bandwidth
    tree: 2 ((g - 1) latency + log2(nodes) latency) + 2 S / (0.9 bandwidth)

Leaves out: text encoders, VAE, evaluation, scores (some bytes an image), the launcher, stragglers, and any overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from marble.bench.shapes import Shape

NUMBER = 4
"""Bytes of a number of the rows, the gradient and a checkpoint (float32)."""
COPIES = 5
"""Sets of P numbers in a LoRA's checkpoint: trained, sampling and averaged weights, and Adam's two moments."""
TREE = 0.9
"""Share of the bandwidth that a tree attains, by NCCL's tuner."""


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        parameters: P, trained numbers.
        base: numbers of the frozen weights.
        flops: of a forward pass of one image.
    """

    parameters: int
    base: int
    flops: float


@dataclass(frozen=True)
class Work:
    """An epoch's work.

    Attributes:
        rewards: K.
        prompts: of an epoch, in all processes.
        group_size: images of a prompt.
        steps: forward passes that sample an image (twice the sampling steps, under guidance).
        timesteps: T, visits of an image.
        updates: of an epoch.
        refresh: an update in so many is exact.
    """

    rewards: int = 5
    prompts: int = 48
    group_size: int = 24
    steps: int = 10
    timesteps: int = 9
    updates: int = 1
    refresh: int = 1

    @property
    def rows(self) -> int:
        """R: a gradient per reward, and that which no advantage touches."""
        return self.rewards + 1


@dataclass(frozen=True)
class Constants:
    """What a machine does in a second, and how it is wired. `sources` says where each number comes from.

    Attributes:
        flops: attained in a forward pass, 1/s.
        update: seconds of a plain update (old and trained forward, backward) over those of a forward pass.
        exact: seconds of an exact update over those of a plain one.
        reward: seconds of one reward for one image.
        gram: bytes of rows whose Gram is formed in a second.
        disk: bytes written in a second.
        gpus: of a node.
        inside: bytes a second that a GPU sends to others of its node.
        between: bytes a second that a GPU sends to other nodes.
        inside_latency: seconds of a ring's step within a node.
        between_latency: seconds of a ring's step between nodes.
        inside_tree: seconds of a tree's step within a node.
        between_tree: seconds of a tree's step between nodes.
    """

    flops: float = 0.4 * 989e12
    update: float = 3.0
    exact: float = 1.38
    reward: float = 0.01
    gram: float = 3.35e12 / 7
    disk: float = 1e9
    gpus: int = 8
    inside: float = 450e9
    between: float = 50e9
    inside_latency: float = 3.4e-6
    between_latency: float = 9.6e-6
    inside_tree: float = 28e-6
    between_tree: float = 50e-6
    sources: dict[str, str] = field(default_factory=dict)


_NCCL = "assumed: NCCL's tuner, src/graph/tuning.cc at 01afd20, protocol Simple"
SOURCES = {
    "flops": "assumed: 40% of 989 TFLOP/s, which NVIDIA publishes for an H100 SXM (dense bfloat16)",
    "update": "assumed: a backward pass through frozen weights takes as long as a forward pass",
    "exact": "measured elsewhere: docs/benchmarks.md, K=5, two CPU threads",
    "reward": "assumed",
    "gram": "assumed: memory bound, 28 bytes moved a number, at the 3.35 TB/s NVIDIA publishes for an H100 SXM",
    "disk": "assumed",
    "gpus": "published: DGX H100 and DGX H200",
    "inside": "published: NVLink 4, 900 GB/s both ways together (H100 and H200 SXM)",
    "between": "published: DGX H100, a 400 Gb/s ConnectX-7 a GPU",
    "inside_latency": _NCCL,
    "between_latency": _NCCL,
    "inside_tree": _NCCL,
    "between_tree": _NCCL,
}
"""Where the defaults come from."""


# ---- bytes ---------------------------------------------------------------------------------------------


def padded(parameters: int, processes: int) -> int:
    """P, made up to a multiple of W."""
    return -(-parameters // processes) * processes


def handed(way: str, parameters: int, rows: int, processes: int) -> int:
    """Bytes that one process hands to collectives in a solve.

    Args:
        way: "gradient", "whole" (all rows to all processes), or "scattered" (each sums its own columns, Grams are
            added up, and the direction is gathered).
        parameters: P.
        rows: R.
        processes: W.
    """
    if processes == 1:
        return 0
    wide = padded(parameters, processes)
    return {
        "gradient": NUMBER * parameters,
        "whole": NUMBER * rows * parameters,
        "scattered": NUMBER * rows * wide + 8 * rows**2 + NUMBER * wide // processes,
    }[way]


def sent(way: str, parameters: int, rows: int, processes: int) -> float:
    """Bytes that one process sends: 2 (W - 1) / W of an all-reduce, half of that of the other two."""
    part, wide = (processes - 1) / processes, padded(parameters, processes)
    return {
        "gradient": 2 * part * NUMBER * parameters,
        "whole": 2 * part * NUMBER * rows * parameters,
        "scattered": part * (NUMBER * (rows + 1) * wide + 2 * 8 * rows**2),
    }[way]


def held(way: str, parameters: int, rows: int, processes: int) -> tuple[int, int]:
    """Bytes of the rows in one process: the most, and what is left once they are summed."""
    whole = NUMBER * rows * parameters
    if way == "whole":
        return whole, whole
    own = NUMBER * rows * padded(parameters, processes) // processes
    return whole + own, own


# ---- seconds -------------------------------------------------------------------------------------------


def ring(moved: float, passes: int, processes: int, at: Constants) -> float:
    """Seconds of a ring that goes round `passes` times (all-reduce 2, the others 1) and sends `moved` bytes a process.

    Between nodes it is as many rings as a node has GPUs, each over a network card of its own: g cards carry what one
    process sends.
    """
    nodes = -(-processes // at.gpus)
    steps, across = passes * (processes - 1), passes * (nodes - 1)
    bandwidth = at.inside if nodes == 1 else min(at.inside, at.gpus * at.between)
    return (steps - across) * at.inside_latency + across * at.between_latency + moved / bandwidth


def tree(size: float, processes: int, at: Constants) -> float:
    """Seconds of an all-reduce of `size` bytes by a tree."""
    nodes, here = -(-processes // at.gpus), min(processes, at.gpus)
    bandwidth = at.inside if nodes == 1 else min(at.inside, at.gpus * at.between)
    latency = (here - 1) * at.inside_tree + math.log2(nodes) * at.between_tree
    return 2 * latency + 2 * size / (TREE * bandwidth)


def message_seconds(way: str, parameters: int, rows: int, processes: int, at: Constants) -> float:
    """Seconds of a solve's messages (or of the ordinary gradient's): the faster of ring and tree, where both can be.

    The scattered way's R messages count as one, as if grouped.
    """
    if processes == 1:
        return 0.0
    moved = sent(way, parameters, rows, processes)
    if way == "scattered":
        part, gram = (processes - 1) / processes, 8 * rows**2
        rows_moved = part * NUMBER * rows * padded(parameters, processes)
        direction = moved - rows_moved - 2 * part * gram
        small = min(ring(2 * part * gram, 2, processes, at), tree(gram, processes, at))
        return ring(rows_moved, 1, processes, at) + small + ring(direction, 1, processes, at)
    return min(ring(moved, 2, processes, at), tree(handed(way, parameters, rows, processes), processes, at))


# ---- a run ---------------------------------------------------------------------------------------------


def predict(model: Model, work: Work, at: Constants, processes: int) -> dict[str, Any]:
    """What an epoch costs on W processes.

    A prompt's images are never split. With more processes than prompts `marble train` refuses; the epoch is then one
    of W prompts, `prompts` says so and `refused` is true.

    Returns:
        Counts, shares, seconds and bytes, by name; bytes and seconds of messages for each of three ways.
    """
    rows, prompts = work.rows, max(work.prompts, processes)
    most, mean = -(-prompts // processes), prompts / processes
    images = most * work.group_size
    forward = model.flops / at.flops
    sampling, judging = work.steps * forward, work.rewards * at.reward
    visit = forward * at.update * (1 + (at.exact - 1) / work.refresh)
    gram = NUMBER * rows * model.parameters / at.gram
    ways: dict[str, dict[str, float]] = {}
    for way in ("gradient", "whole", "scattered"):
        seconds = message_seconds(way, model.parameters, rows, processes, at)
        numbers = (way, model.parameters, rows, processes)
        ways[way] = {"handed_bytes": handed(*numbers), "sent_bytes": sent(*numbers), "seconds": seconds}
    solves = work.updates / work.refresh
    phases = {
        "rollout": images * sampling,
        "rewards": images * judging,
        "update": images * work.timesteps * visit,
        "messages": solves * ways["whole"]["seconds"] + (work.updates - solves) * ways["gradient"]["seconds"],
        "gram": solves * gram,
    }
    epoch = sum(phases.values())
    alone = prompts * work.group_size * (sampling + judging + work.timesteps * visit) + solves * gram
    for way, divided in (("whole", 1), ("scattered", processes)):
        ways[way]["share"] = solves * (ways[way]["seconds"] + gram / divided) / epoch
        ways[way]["peak_bytes"], ways[way]["left_bytes"] = held(way, model.parameters, rows, processes)
    ways["gradient"]["share"] = work.updates * ways["gradient"]["seconds"] / epoch
    checkpoint = NUMBER * COPIES * model.parameters
    return {
        "processes": processes,
        "prompts": prompts,
        "refused": processes > work.prompts,
        "no_idle_prompts": padded(work.prompts, processes),
        "images": images,
        "idle": 1 - mean / most,
        "seconds": phases | {"epoch": epoch},
        "images_per_second": prompts * work.group_size / epoch,
        "efficiency": alone / (processes * epoch),
        "ways": ways,
        "aside": rewards_aside(processes, sampling, judging, epoch - phases["rewards"]),
        "checkpoint": {"bytes": checkpoint, "seconds": checkpoint / at.disk},
        "weights_bytes": 2 * model.base + NUMBER * COPIES * model.parameters,
    }


def rewards_aside(processes: int, sampling: float, judging: float, rest: float) -> dict[str, float | None]:
    """Reward processes of their own, out of the same W: how many keep up, and what the epoch would take.

    Images are judged while the next ones are sampled; updates wait for all scores. Prompts are taken to divide as
    they like. With machines of one kind it never pays: reward processes stand still during updates.

    Args:
        processes: W.
        sampling: seconds of an image.
        judging: seconds of an image's scores, all rewards.
        rest: seconds of the epoch without its rewards, all W at it.

    Returns:
        `rollout_processes_a_reward_process` (None without rewards' time), `reward_processes`, `epoch_seconds`
        (None if nobody is left to sample).
    """
    if not judging:
        return {"rollout_processes_a_reward_process": None, "reward_processes": 0, "epoch_seconds": rest}
    needed = math.ceil(processes * judging / (sampling + judging))
    left = processes - needed
    return {
        "rollout_processes_a_reward_process": sampling / judging,
        "reward_processes": needed,
        "epoch_seconds": rest * processes / left if left else None,
    }


def model_of(shape: Shape, rank: int, parameters: int | None = None) -> Model:
    """Count a shape's numbers and a forward pass's operations, with no memory taken.

    Args:
        shape: one of `SHAPES`.
        rank: of a LoRA on its targets.
        parameters: P, if not that LoRA's.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network: Any = shape.build()
        inputs = {shape.latent_argument: torch.randn(1, *shape.latents), "timestep": torch.rand(1), **shape.inputs(1)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(**inputs)
    endings = tuple(f".{target}" for target in shape.targets)
    layers = [m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(endings)]
    trained = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    base = sum(p.numel() for p in network.parameters())
    return Model(parameters or trained, base, counter.get_total_flops())


def constants(given: dict[str, float], measured: dict[str, float], where: str) -> Constants:
    """The defaults, over them what was measured (`where`), and over that what was given."""
    numbers = {f.name: getattr(Constants(), f.name) for f in fields(Constants) if f.name != "sources"}
    sources = SOURCES | dict.fromkeys(measured, f"measured: {where}") | dict.fromkeys(given, "given")
    return Constants(**{**numbers, **measured, **given}, sources=sources)


def table(model: Model, work: Work, at: Constants, processes: Sequence[int]) -> dict[str, Any]:
    """Everything that was put in, and `predict` for each W."""
    content = {"model": asdict(model), "work": asdict(work), "constants": asdict(at)}
    return content | {"rows": [predict(model, work, at, count) for count in processes]}
