"""Objectives: per-image losses that are affine in the advantage."""

from marble.objectives.affine import AffineLoss
from marble.objectives.awm import awm_loss
from marble.objectives.nft import nft_loss
from marble.objectives.ppo import ppo_loss

__all__ = ["AffineLoss", "awm_loss", "nft_loss", "ppo_loss"]
