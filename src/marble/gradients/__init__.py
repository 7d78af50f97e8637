"""Gradients: one per reward, from two backward passes whatever the number of rewards."""

from marble.gradients.engine import PerRewardGradients
from marble.gradients.reference import gram_of, reference_gradients

__all__ = ["PerRewardGradients", "gram_of", "reference_gradients"]
