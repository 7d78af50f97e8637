"""Memory: what an error says of it, what is free, and what training will take."""

from __future__ import annotations

import gc
import os

import torch

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def forget(device: torch.device) -> None:
    """Give cached memory back, after an error has let go of its tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can still be had; physical memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
        f"{rewards} rewards' gradients and the common one": 4 * (rewards + 1) * parameters,
    }
