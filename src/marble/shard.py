"""The frozen base in shards, one a process, so that models larger than a GPU can be trained.

PyTorch's FSDP2 gathers a block's weights when the block is called and lets them go afterwards, forwards and backwards.
What is trained stays whole in every process: its gradients are taken for every reward and summed by `distributed.py`
as without shards. Every call of the denoiser and every backward pass through it is then made by all processes together,
so all of them must make as many, in the same order (`in_step`, where that matters).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from marble.distributed import active
from marble.errors import MarbleError


def shard_base(denoiser: nn.Module, keep: Iterable[nn.Parameter], device: torch.device) -> None:
    """Leave this process a share of every frozen weight, in place; the denoiser is called as before.

    Args:
        denoiser: whole, the same in all processes; best still in the CPU's memory, from where each process's share goes
            to its GPU block by block.
        keep: parameters that stay whole, and go to the device: all adapters', trained or not.
        device: this process's own.

    Raises:
        MarbleError: there is one process, or a weight of the base is trained or quantised.
    """
    if not active():
        raise MarbleError("model.shard: a base in shards needs several processes; launch with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = set(keep)
    for name, parameter in denoiser.named_parameters():
        if parameter in whole:
            continue
        if parameter.requires_grad:
            raise MarbleError(f"model.shard: {name} is trained; only a frozen base can be in shards: use a LoRA")
        if not parameter.is_floating_point():
            raise MarbleError(f"model.shard: {name} is quantised; use model.quantize or model.shard, not both")
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks_of(denoiser):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(denoiser, mesh=mesh, ignored_params=whole)
    # Diffusers' blocks return views of what they computed, and nothing writes to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The parts that are gathered one after the other: the items of the outermost lists of modules."""
    if isinstance(denoiser, nn.ModuleList):
        return list(denoiser)
    return [block for part in denoiser.children() for block in blocks_of(part)]
