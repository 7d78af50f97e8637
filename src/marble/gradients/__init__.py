"""Gradients: one per reward, from two backward passes whatever the number of rewards."""

from marble.gradients.engine import PerRewardGradients
from marble.gradients.reference import reference_gradients
from marble.gradients.rows import Rows, gram_of, whole_gram

__all__ = ["PerRewardGradients", "Rows", "gram_of", "reference_gradients", "whole_gram"]
