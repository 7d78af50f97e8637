"""Noise: what schedulers add, what is left under it, and steps whose randomness is known."""

from __future__ import annotations

from marble.noise.levels import PREDICTIONS, NoiseLevels, levels_of, prediction_of
from marble.noise.schedulers import make_scheduler
from marble.noise.stochastic import NOISE, Trajectory, Transitions, transitions_of

__all__ = [
    "NOISE",
    "PREDICTIONS",
    "NoiseLevels",
    "Trajectory",
    "Transitions",
    "levels_of",
    "make_scheduler",
    "prediction_of",
    "transitions_of",
]
