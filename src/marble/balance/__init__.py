"""Balance: from the Gram matrix of per-reward gradients to a weight for each reward."""

from marble.balance.balancer import Balancer
from marble.balance.dual_cone import keep_floors
from marble.balance.min_norm import min_norm_weights

__all__ = ["Balancer", "keep_floors", "min_norm_weights"]
