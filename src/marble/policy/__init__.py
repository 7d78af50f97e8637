"""A Diffusers pipeline as a policy: sample with a set of weights, and predict clean latents along the way."""

from __future__ import annotations

from marble.policy.loading import model_path
from marble.policy.policy import Policy
from marble.policy.sampling import Prediction, Samples
from marble.policy.weights import ADAPTERS

__all__ = ["ADAPTERS", "Policy", "Prediction", "Samples", "model_path"]
