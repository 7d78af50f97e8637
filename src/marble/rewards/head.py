"""The linear head of LAION's aesthetic predictor, which ImageReward took over."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Five linear layers with nothing between them that counts when scoring; named and numbered as published."""

    def __init__(self, width: int) -> None:
        """Of `[N, width]` features."""
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """`[N]` of `[N, width]`."""
        return self.layers(features).squeeze(-1)
