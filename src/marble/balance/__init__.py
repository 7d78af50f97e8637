"""Balance: from the Gram matrix of per-reward gradients to a weight for each reward."""

from marble.balance.balancer import Balancer
from marble.balance.min_norm import min_norm_weights

__all__ = ["Balancer", "min_norm_weights"]
