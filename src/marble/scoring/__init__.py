"""Scoring a model on held-out prompts, portion by portion, against another: what `marble evaluate` does.

A portion is a few prompts, made and judged by one process alone. Its scores depend on nothing else, so that a scoring
broken off and gone on with, or shared by several processes, ends in the same numbers, bit for bit.
"""

from marble.scoring.differences import differences
from marble.scoring.overlay import Overlay
from marble.scoring.plan import Plan, make_plan
from marble.scoring.portions import score
from marble.scoring.summary import Estimate, RewardSummary, summarise

__all__ = ["Estimate", "Overlay", "Plan", "RewardSummary", "differences", "make_plan", "score", "summarise"]
