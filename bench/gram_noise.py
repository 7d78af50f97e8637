"""How well one batch knows the rewards' true gradients, and what averaging and halving do about it.

    .venv/bin/python bench/gram_noise.py [RUN] [--batches 60] [--json FILE]

Many independent batches at one fixed policy: the base model's, or that of a run's newest checkpoint. Their mean is the
truth, as far as that many batches know it (products across batches, so that noise does not enter). Against it:
norms and cosines of one batch, and the weights that each way of smoothing would have solved for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marble.balance import Balancer
from marble.balance.method import Method
from marble.config import demo_config_path, make_config, read_config
from marble.objectives.visit import plan_epoch, visit_loss
from marble.rewards import score_images
from marble.rollout import collect
from marble.run import Run
from marble.setup import assemble

WINDOW = 20
"""Batches that a moving average has seen when it is compared."""
WAYS: dict[str, dict[str, Any]] = {
    "one batch": {"decay": 0.0},
    "one batch, halves": {"decay": 0.0, "estimate": "halves"},
    "weights averaged, decay 0.7": {"decay": 0.7},
    "weights averaged, decay 0.9": {"decay": 0.9},
    "Gram averaged, decay 0.7": {"decay": 0.7, "smooth": "gram"},
    "Gram averaged, decay 0.9": {"decay": 0.9, "smooth": "gram"},
    "Gram averaged, decay 0.9, halves": {"decay": 0.9, "smooth": "gram", "estimate": "halves"},
    "Gram averaged, decay 0.97, halves": {"decay": 0.97, "smooth": "gram", "estimate": "halves"},
}


def gather(run: Path | None, batches: int) -> tuple[list[str], Tensor, list[Tensor]]:
    """Rows of every batch's halves: names, `[B, 2, K, P]` own parts, signals."""
    config = make_config(read_config(demo_config_path() if run is None else run / "config.yaml"))
    config = config.model_copy(update={"balance": config.balance.model_copy(update={"estimate": "halves"})})
    parts = assemble(config)
    if run is not None:
        state = Run(run).load_checkpoint()
        for name, weights in (state or {})["adapters"].items():
            parts.policy.load_adapter_state(name, weights)
    method, own, signs = Method(config), [], []
    for number in range(batches):
        batch = parts.prompts.batch(10_000 + number)
        rollout = collect(parts.policy, batch, steps=config.rollout.steps, images_per_call=config.rollout.batch)
        table = score_images(parts.rewards, rollout.images, batch.records, batch.group_ids)
        signals = parts.method.signals(table, batch.group_ids)
        for_slope, for_const = method.columns(signals)
        plan = plan_epoch(
            len(rollout.x0),
            config.rollout.steps,
            timesteps=config.objective.timesteps,
            updates=config.optimizer.updates_per_epoch,
            micro_batch=72,
            seed=1,
            epoch=number,
        )[0]
        rows = parts.engine.rows(for_slope.shape[1], 2)
        total = sum(map(len, plan))
        for visits in plan:
            with parts.engine:
                loss, _ = visit_loss(parts.policy, rollout, visits, config.objective)
                slopes = loss.effective(for_slope[visits.images]) / total
                parts.engine.accumulate(rows, loss, slopes, for_const[visits.images] / total)
        count = len(parts.rewards)
        own.append(rows.matrix()[: 2 * count].view(2, count, -1))
        signs.append(signals.signal)
        print(f"{number + 1}/{batches}", end="\r", flush=True)
    return [reward.name for reward in parts.rewards], torch.stack(own), signs


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.batches < WINDOW:
        parser.error(f"--batches: at least {WINDOW}, got {args.batches}")
    names, halves, signs = gather(args.run, args.batches)
    count, own = len(names), halves.sum(dim=1).double()  # [B, K, P]
    total = own.sum(dim=0)
    squares = torch.stack([rows @ rows.T for rows in own])
    truth = (total @ total.T - squares.sum(dim=0)) / (len(own) * (len(own) - 1))  # products across batches only
    norms = truth.diagonal().clamp_min(0).sqrt()
    cosines = truth / (norms[:, None] * norms)
    lengths = squares.diagonal(dim1=1, dim2=2).sqrt()  # [B, K]
    seen = squares / (lengths[:, :, None] * lengths[:, None])
    print("\n| reward | norm in one batch over the true norm | cosine of one batch's gradient with the true one |")
    print("|---|---|---|")
    mean = total / len(own)
    for k, name in enumerate(names):
        # the batch itself is a part of the mean; leave it out
        rest = (total[k] - own[:, k]) / (len(own) - 1)
        known = ((own[:, k] * rest).sum(dim=1) / (lengths[:, k] * norms[k])).mean()
        print(f"| {name} | {(lengths[:, k].mean() / norms[k]):.2f} | {known:.2f} |")
    off = ~torch.eye(count, dtype=torch.bool)
    print(f"\ncosines between rewards: true mean {cosines[off].mean():+.2f}, in one batch {seen[:, off].mean():+.2f}")
    print("true cosines:", [[round(v, 2) for v in row] for row in cosines.tolist()])
    best = Balancer(count, decay=0.0).step(truth)
    print("weights of the truth:", [round(v, 3) for v in best.tolist()], f"(mean norm {mean.norm(dim=1).mean():.2e})")
    print("\n| weights from | L1 distance to the truth's | their direction's worst true cosine |\n|---|---|---|")
    unit = torch.diag(1 / norms)
    found: dict[str, dict[str, float]] = {}
    for way, settings in WAYS.items():
        errors, worst = [], []
        for start in range(0, len(own) - WINDOW + 1, WINDOW // 4):
            balancer = Balancer(
                count, refresh=1, decay=settings["decay"], smooth=settings.get("smooth", "weights"), fold=True
            )
            for b in range(start, start + WINDOW):
                first, second = halves[b].double()
                across = 2 * (first @ second.T + second @ first.T)
                estimate = across if settings.get("estimate") == "halves" else squares[b]
                balancer.step(estimate, signs[b], squares[b].diagonal())
            errors.append((balancer.alpha - best).abs().sum().item())
            mixture = balancer.coefficients
            products = unit @ truth @ mixture
            worst.append((products.min() / (mixture @ truth @ mixture).sqrt()).item())
        found[way] = {"error": sum(errors) / len(errors), "worst_cosine": sum(worst) / len(worst)}
        print(f"| {way} | {found[way]['error']:.3f} | {found[way]['worst_cosine']:+.3f} |")
    ideal = best / norms
    top = (unit @ truth @ ideal).min() / (ideal @ truth @ ideal).sqrt()
    uniform = (unit @ truth @ (1 / norms)).min() / ((1 / norms) @ truth @ (1 / norms)).sqrt()
    print(f"| the truth | 0 | {top:+.3f} |\n| uniform on unit gradients | | {uniform:+.3f} |")
    if args.json:
        args.json.write_text(json.dumps({"names": names, "cosines": cosines.tolist(), "ways": found}, indent=1))


if __name__ == "__main__":
    main()
