"""Rewards: what a reward is, those that come with marble, and how a batch of images is judged by several."""

from marble.rewards.base import Facts, Reward, RewardTable
from marble.rewards.judging import Judging, applies_to, score_images
from marble.rewards.load import load_rewards, make_reward

__all__ = ["Facts", "Judging", "Reward", "RewardTable", "applies_to", "load_rewards", "make_reward", "score_images"]
