"""Memory: what an error says of it, what is free, and what training will take."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from marble.errors import MarbleError, first_line

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def forget(device: torch.device) -> None:
    """Give cached memory back, after an error has let go of its tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def find_device(device: str, field: str = "model.device", *, shared: bool = False) -> torch.device:
    """`auto` is this process's own GPU, or the CPU; anything else is taken at its word.

    Args:
        device: what was asked for.
        field: the setting, for messages.
        shared: whether several processes may have the same.

    Raises:
        MarbleError: no such device here.
    """
    own = device == "auto"
    if own:
        if torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        else:
            device = "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise MarbleError(f'{field}: "{device}" cannot be used here: {first_line(error)}') from error
    if found.type not in ("cpu", "cuda", "mps", "xpu"):
        raise MarbleError(f'{field}: "{device}" holds no numbers; use auto, cpu or cuda')
    if found.index is not None and not own and not shared and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MarbleError(f'{field}: several processes cannot all have "{device}"; use auto')
    return found


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can still be had: of the CPU what is not in use, files in its cache not counted."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def full_training_bytes(parameters: int, rewards: int, *, adam_bytes: int = 8) -> dict[str, int]:
    """What full fine-tuning keeps in memory for P trained parameters in single precision, activations left out.

    Args:
        parameters: P.
        rewards: K, each of which has a gradient at a solve.
        adam_bytes: of the optimiser's state, for a parameter.
    """
    return {
        "weights": 4 * parameters,
        "sampling, averaged and base copies": 12 * parameters,
        "gradient": 4 * parameters,
        "optimiser": adam_bytes * parameters,
        f"{rewards} rewards' gradients, the common one and two for a diagnosis": 4 * (rewards + 3) * parameters,
    }
