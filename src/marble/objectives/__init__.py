"""Objectives: per-image losses that are affine in the advantage."""

from marble.objectives.affine import AffineLoss
from marble.objectives.nft import nft_loss

__all__ = ["AffineLoss", "nft_loss"]
