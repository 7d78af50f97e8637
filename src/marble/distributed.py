"""Several processes as one: who they are, what each has its share of, sums, and what the main one decides.

A launcher (torchrun, `accelerate launch`) starts the same program N times. Each process has a copy of the model and
a share of the prompts; what they tell each other is exact, so that all of them go the same way: scores as bytes,
gradients as sums. Per-reward gradients are summed over micro-batches first and over processes once, before the Gram is
formed: the Gram of a sum is not the mean of the Grams. Nothing is pickled. With one process nothing is sent.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from marble.errors import MarbleError

_PATIENCE = timedelta(hours=1)
"""How long one process waits for the others: rewards and downloads may take one of them long."""
_GRACE = 5.0
"""Seconds that a failing process leaves the main one to say what went wrong; the launcher then ends the others."""
_PIECE = 2**26
"""Bytes in one message of `spread`."""
_ENGINES = {
    "DEEPSPEED": "ZeRO cuts up and reduces the gradients itself while a backward pass runs, as one gradient per "
    "parameter, so that every reward's own gradient cannot be summed exactly",
    "FSDP": "Accelerate would cut up what is trained too, while every reward's gradient is taken from whole "
    "parameters; for a frozen base in shards set model.shard: true",
    "MEGATRON_LM": "it needs its own models in place of Diffusers'",
}
"""Engines of `accelerate launch` that cannot be honoured, and why."""


class LostError(MarbleError):
    """Another process is gone: what follows from its error, and not the cause."""


# ---- together ------------------------------------------------------------------------------------------


def start() -> bool:
    """Join the other processes that a launcher started with this one; whether this call did.

    Nothing happens with one process, or where the program has joined them already. Accelerate chooses the GPU by
    `LOCAL_RANK` and NCCL, or the CPU and gloo (with `ACCELERATE_USE_CPU=true`, or where there is no GPU).

    Raises:
        MarbleError: launched with DeepSpeed or Megatron-LM, more processes than GPUs, or the others cannot be reached.
    """
    for engine, reason in _ENGINES.items():
        if _flag(f"ACCELERATE_USE_{engine}"):
            raise MarbleError(
                f"launched with ACCELERATE_USE_{engine}=true: {reason}. Launch with torchrun, or with "
                "`accelerate launch --multi_gpu` (see docs/distributed.md)"
            )
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if expected < 2 or not dist.is_available() or dist.is_initialized():
        return False
    from accelerate import PartialState

    cpu, here = _flag("ACCELERATE_USE_CPU") or not _has_gpus(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cpu and torch.accelerator.device_count() < here:
        raise MarbleError(
            f"{here} processes were launched on a machine with {torch.accelerator.device_count()} GPUs: one process a "
            "GPU (torchrun --nproc_per_node, accelerate launch --num_processes)"
        )
    with _talking():
        PartialState(cpu=cpu, timeout=_PATIENCE)
    if world() != expected:
        raise MarbleError(f"WORLD_SIZE says {expected} processes, but Accelerate joined {world()}")
    return True


def finish() -> None:
    """Part from the other processes, when all are done."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from accelerate import PartialState

    dist.destroy_process_group()
    PartialState._reset_state()


@contextmanager
def together() -> Iterator[bool]:
    """A command as a launcher runs it: start, do it, finish; gives whether there are others.

    An error ends all of them, and is said once.

    A mistake that all processes find is raised in the main one at once, and the launcher ends the others while they
    wait. What goes wrong in another one alone is raised there, with its number, after a moment, while the main one
    waits.
    """
    number = int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0
    try:
        began = start()
        yield began
        if began:
            barrier()
            finish()
    except KeyboardInterrupt:
        if number:
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if number or isinstance(error, LostError):
            time.sleep(_GRACE)
        if number and isinstance(error, MarbleError):
            raise MarbleError(f"process {number}: {error}") from error
        raise


def leave(code: int) -> NoReturn:
    """End a process whose work is done, at once.

    With gloo, one that ends as usual is now and then aborted by a thread of PyTorch's that is still there
    ("terminate called without an active exception"), and the launcher then takes the run for a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def active() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if active() else 0


def is_main() -> bool:
    """Whether this is the one process that decides, writes files and talks to the user."""
    return rank() == 0


def local_device() -> torch.device | None:
    """The GPU that is this process's own, None where there are none or several processes share no machine with one."""
    if not active() or _flag("ACCELERATE_USE_CPU") or not _has_gpus():
        return None
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def share(count: int, process: int | None = None) -> range:
    """Which of `count` things are this process's (or another's): all have as many, or one less; none is in two."""
    number, least, more = rank() if process is None else process, *divmod(count, world())
    first = number * least + min(number, more)
    return range(first, first + least + (number < more))


# ---- sums and rows -------------------------------------------------------------------------------------


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place; the same bits on each."""
    return _reduced(values, dist.ReduceOp.SUM) if active() else values


def total(number: float) -> float:
    """The sum of a number over all processes."""
    return sum_over_processes(torch.tensor(number, dtype=torch.float64)).item() if active() else number


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the parameters' `.grad` over all processes in one message; a missing one counts as 0."""
    if not active():
        return
    chosen = list(parameters)
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in chosen]
    flat = sum_over_processes(torch.cat([part.flatten() for part in parts]))
    for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter)


def gather_rows(rows: Tensor, own: range, count: int) -> Tensor:
    """The rows of all processes, bit for bit, in every one of them.

    Args:
        rows: `[len(own), …]`, any dtype but the same everywhere; of any shape where there are none.
        own: which of the rows these are. The processes' ranges do not overlap.
        count: rows in all; those that nobody has are 0.

    Returns:
        `[count, …]`.
    """
    if not active():
        return rows
    shape = torch.zeros(8, dtype=torch.int64)
    if len(own):
        shape[: rows.ndim] = torch.tensor([rows.ndim, *rows.shape[1:]])
    _reduced(shape, dist.ReduceOp.MAX)
    whole = torch.zeros(count, *shape[1 : int(shape[0])].tolist(), dtype=rows.dtype, device=rows.device)
    if len(own):
        whole[own.start : own.stop] = rows
    sum_over_processes(whole.view(-1).view(torch.uint8))  # every byte is 0 in all processes but one
    return whole


# ---- decisions -----------------------------------------------------------------------------------------


def agree(flag: bool) -> bool:
    """The main process's answer, in all of them."""
    return bool(_from_main(torch.tensor(flag, dtype=torch.uint8)).item()) if active() else flag


def decide(action: Callable[[], Any]) -> Any:
    """What `action` gives in the main process, in all of them; only the main one calls it.

    Args:
        action: gives something that JSON can hold. A `MarbleError` of it is raised everywhere.
    """
    if not active():
        return action()
    answer: dict[str, Any] = {}
    if is_main():
        try:
            answer = {"value": action()}
        except MarbleError as error:
            answer = {"error": str(error)}
    answer = json.loads(spread(json.dumps(answer).encode()))
    if "error" in answer:
        raise MarbleError(answer["error"])
    return answer["value"]


def spread(data: bytes) -> bytes:
    """The main process's bytes, in all of them."""
    if not active():
        return data
    size = int(_from_main(torch.tensor(len(data))).item())
    whole = torch.zeros(size, dtype=torch.uint8)
    if is_main() and size:
        whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for piece in whole.split(_PIECE):
        _from_main(piece)
    return whole.numpy().tobytes()


def barrier() -> None:
    """Wait until all processes are here."""
    total(0.0)


# ---- how -----------------------------------------------------------------------------------------------


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _has_gpus() -> bool:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind is not None and kind.type != "mps"  # Apple's GPU is one, and has no collectives


def _reduced(values: Tensor, operation: Any) -> Tensor:
    with _talking():
        there = values.to(_carrier(values))
        dist.all_reduce(there, operation)
    return values if there is values else values.copy_(there)


def _from_main(values: Tensor) -> Tensor:
    with _talking():
        there = values.to(_carrier(values))
        dist.broadcast(there, 0)
    return values if there is values else values.copy_(there)


def _carrier(values: Tensor) -> torch.device:
    """Where the backend takes values: NCCL on the GPU alone, gloo anywhere."""
    if dist.get_backend() != "nccl" or values.is_cuda:
        return values.device
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _talking() -> Iterator[None]:
    """Another process that is gone is not this one's error."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostError(
                "another process of this run has ended or cannot be reached; its own message says why"
            ) from error
        raise
