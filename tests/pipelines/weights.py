"""Random weights that let every input through."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def redraw(model: M, gain: float = 1.0) -> M:
    """Draw every matrix and kernel anew, of variance `gain² / fan-in`.

    The libraries' own values leave some at zero (last layers, padding tokens) and most so small that a text or a
    latent hardly shows at the other end.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                tokens = parameter.shape[0] == 1  # rows that stand beside each other, not the weights of one sum
                fan_in = parameter.shape[-1] if tokens else parameter[0].numel()
                parameter.normal_(std=gain * fan_in**-0.5)
    return model.eval()
