"""The methods and objectives that a config can name: each in one line, once."""

from __future__ import annotations

FROM_GRADIENTS = {
    "marble": "min-norm weights of the rewards' gradients, norms folded in, spread matched, visits by importance",
    "published": "the same as its paper has it: weights applied to raw gradients between refreshes",
    "closed-loop": "marble (with even visits), with priorities that lift the reward whose measured progress lags",
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
    "ppo": "PPO on the sampler's own steps: Flow-GRPO for flow models, DDPO for all others",
}

SCHEDULERS = {
    "own": "the pipeline's own",
    "dpm++": "DPM-Solver++ 2M",
    "euler": "Euler, of the flow or of the probability flow",
    "ddim": "DDIM; not for flow models",
    "sde": "noisy steps of known log-probability, for ppo: Flow-GRPO's for flow models, DDIM with eta 1 for others",
}
"""What a pipeline may sample with."""

ARMS: dict[str, tuple[str, dict[str, object]]] = {
    "ppo": (
        "PPO on the weighted sum of raw scores: Flow-GRPO for flow models, DDPO for epsilon models",
        {"objective.name": "ppo", "rollout.scheduler": "sde", "balance.method": "weighted-sum"},
    ),
    "awm": (
        "advantage-weighted matching on the weighted sum of raw scores",
        {"objective.name": "awm", "balance.method": "weighted-sum"},
    ),
    "published-first": (
        "published, every solve on the first micro-batch alone; its authors' code does so from the second solve on",
        {"balance.method": "published", "balance.solve_share": 1e-9},
    ),
    "published-every": (
        "published, solving in every update and without smoothing",
        {"balance.method": "published", "balance.refresh": 1, "balance.decay": 0.0},
    ),
    "published-uniform": (
        "published with equal weights in place of solved ones",
        {"balance.method": "uniform", "balance.advantage_scale": "published", "balance.norms": "raw"},
    ),
    "unnormalised": (
        "published without normalising gradients before it solves",
        {"balance.method": "mgda", "balance.advantage_scale": "published", "balance.norms": "raw"},
    ),
}
"""What `marble compare` can name besides methods: a line about it, and the settings that it lays over a config."""

SPECIALIST = "specialist:"
SPECIALISTS = "specialists"
ARM_FORMS = {
    f"{SPECIALIST}REWARD": "trains on that reward alone; the others are evaluated all the same",
    SPECIALISTS: "a specialist for every training reward",
    "NAME=BASE:setting=value,…": "any of these with settings: gentle=marble:balance.refresh=5,balance.decay=0.9",
}
"""Arms that are not one fixed name."""
