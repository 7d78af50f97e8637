"""The methods and objectives that a config can name: each in one line, once."""

from __future__ import annotations

FROM_GRADIENTS = {
    "marble": "min-norm weights of the rewards' gradients, norms folded in, advantage spread matched",
    "published": "the same as its paper has it: weights applied to raw gradients between refreshes",
    "closed-loop": "marble, with priorities that lift the reward whose measured progress lags",
    "mgda": "min-norm weights of gradients that are not normalised",
    "upgrad": "mean of the gradients, each turned until it conflicts with none",
    "dualproj": "mean of the gradients, turned until it conflicts with none",
    "cagrad": "best for the worst-served reward within a ball around the mean gradient",
    "nash-mtl": "the bargain in which every reward gains the same share",
    "pcgrad": "gradients projected off each other in random order",
    "imtl-g": "equal projections on all gradients",
    "aligned-mtl": "gradients made orthogonal and equally long",
}
"""Methods that ask for every reward's own gradient."""

NEED_TORCHJD = ("pcgrad", "imtl-g", "aligned-mtl")
"""Methods that need the extra `torchjd`."""

FROM_ADVANTAGES = {
    "uniform": "equal weights on per-reward advantages",
    "weighted-sum": "one advantage of the weighted sum of raw scores, as PPO and GRPO pipelines do",
    "standardised-sum": "the same of scores divided by each reward's standard deviation in the batch",
    "sequential": "one stage of training after another, each on the raw sum of some of the rewards",
    "gdpo": "per-reward advantages summed and normalised again over the batch",
    "reward-dropout": "per-reward advantages of a random part of the rewards in every update",
}
"""Methods that combine advantages. `uniform` looks at gradients too, for their norms, if those are folded."""

SUMS = ("weighted-sum", "standardised-sum", "sequential")
"""Methods that follow one advantage of a sum of scores, weighed by `rewards.N.weight`."""

METHODS = FROM_GRADIENTS | FROM_ADVANTAGES

OBJECTIVES = {
    "nft": "DiffusionNFT: towards good samples and away from bad ones, relative to the old policy",
    "awm": "advantage-weighted matching: the pretraining loss weighted by the advantage, clipped as in PPO",
}

SCHEDULERS = {
    "own": "the pipeline's own",
    "dpm++": "DPM-Solver++ 2M",
    "euler": "Euler, of the flow or of the probability flow",
    "ddim": "DDIM; not for flow models",
}
"""What a pipeline may sample with."""
