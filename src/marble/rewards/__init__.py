"""Rewards: what a reward is, those that come with marble, and how a batch of images is judged by several."""

from marble.rewards.base import Facts, Reward, RewardTable
from marble.rewards.judging import Judging, applies_to, score_images
from marble.rewards.load import check_rewards, facts_of, load_rewards, make_reward, prepare_rewards

__all__ = [
    "Facts",
    "Judging",
    "Reward",
    "RewardTable",
    "applies_to",
    "check_rewards",
    "facts_of",
    "load_rewards",
    "make_reward",
    "prepare_rewards",
    "score_images",
]
