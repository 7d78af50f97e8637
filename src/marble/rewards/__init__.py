"""Rewards: what a reward is, and how a batch of images is scored by several."""

from marble.rewards.base import Reward, RewardTable, load_rewards, score_images

__all__ = ["Reward", "RewardTable", "load_rewards", "score_images"]
