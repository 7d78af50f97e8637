"""What `test_distributed.py` runs, alone and beside `python -m tests.two_processes FOLDER PIPELINE`.

Launched with several processes, `… fail NUMBER` is a command that goes wrong in one of them, and `… shard FOLDER` what
`test_shard.py` runs.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from marble import Balancer, PerRewardGradients, distributed, nft_loss
from marble.config import Config
from marble.distributed import agree, decide, gather_rows, is_main, rank, share, spread, sum_gradients, world
from marble.errors import MarbleError
from marble.gradients import gram_of
from marble.shard import shard_base

from .small import IMAGES, REWARDS, Trial, config_of, flat
from .tiny import LINEARS, add_lora, build, inputs_of, loss_of, predict

PATIENCE = 60  # seconds that one process waits for the other
UPDATES, COUNT = 6, 8
OWN = {None: range(COUNT), 0: range(3), 1: range(3, COUNT)}  # not in the middle: shares need not be equal

CASES: dict[str, Config] = {
    "exact": config_of(objective={"kl": 0.1}),
    "amortised": config_of(balance={"refresh": 3}, objective={"kl": 0.1}),
    "published": config_of(balance={"method": "published", "refresh": 2}, objective={"kl": 0.1}),
    "diagnosed": config_of(balance={"refresh": 2, "estimate": "halves", "smooth": "gram"}, diagnose_every=1),
    "weighted sum": config_of(balance={"method": "weighted-sum"}),
    "solve on a share": config_of(balance={"solve_share": 0.5}, optimizer={"micro_batch": 3}),
    "one visit an update": config_of(balance={"refresh": 2}, optimizer={"updates_per_epoch": 24}, diagnose_every=3),
}
SPLIT = {None: None, 0: range(5), 1: range(5, IMAGES)}


class LowRank(nn.Module):
    """A frozen layer and two thin ones beside it, in double precision."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(a, b, bias=False).double() for a, b in ((width, width), (width, 2), (2, width))
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def toy_run(own: range) -> dict[str, Any]:
    """Some updates of a toy network, every second one exact, in two micro-batches: the library's parts, no `step.py`.

    Returns:
        The parameters `[P]` at the end, the balance after each update, and what was reduced during each.
    """
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(LowRank(6, generator), nn.Tanh(), LowRank(6, generator))
    x, x0, old = torch.randn(3, COUNT, 4, 6, dtype=torch.float64, generator=generator)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    balancer = Balancer(REWARDS, refresh=2, fold=True)
    engine = PerRewardGradients(module, dtype=torch.float64)
    alphas, reduced = [], []
    for _ in range(UPDATES):
        advantages = torch.randn(COUNT, REWARDS, dtype=torch.float64, generator=generator)
        with Reductions() as sizes:
            halves = torch.arange(own.start, own.stop).tensor_split(2)
            if balancer.due():
                gathered = engine.rows(REWARDS, 1)
                for chosen in halves:
                    with engine:
                        loss = nft_loss(x0[chosen], module(x[chosen]), old[chosen], beta=0.5, amax=5.0)
                        each = torch.full((len(chosen), 1), 1 / COUNT)
                        engine.accumulate(gathered, loss, loss.effective(advantages[chosen]) / COUNT, each)
                gathered.sum_over_processes()
                rows = gathered.matrix()
                rows[:-1] += rows[-1]  # whole gradients
                alphas.append(balancer.step(gram_of(rows[:-1])))
                start = 0
                direction = balancer.coefficients @ rows[:-1]
                for parameter in trained:
                    parameter.grad = direction[start : start + parameter.numel()].view_as(parameter)
                    start += parameter.numel()
            else:
                alphas.append(balancer.step())
                combined = advantages.clamp(-5, 5) @ balancer.coefficients
                for chosen in halves:
                    loss = nft_loss(x0[chosen], module(x[chosen]), old[chosen], beta=0.5, amax=5.0)
                    (loss.at(combined[chosen]).sum() / COUNT).backward()
                sum_gradients(trained)
            optimizer.step()
            optimizer.zero_grad()
        reduced.append(sizes)
    return {"parameters": flat(trained), "alphas": torch.stack(alphas), "reduced": reduced, "count": engine.count}


class Reductions:
    """`with Reductions() as sizes`: how many numbers each reduction over the processes was of."""

    def __enter__(self) -> list[int]:
        self.all_reduce, sizes = dist.all_reduce, []

        def counted(values: Tensor, *arguments: Any, **options: Any) -> Any:
            sizes.append(values.numel())
            return self.all_reduce(values, *arguments, **options)

        dist.all_reduce = counted
        return sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.all_reduce


def pipeline_run(trial: Trial, case: str, number: int | None) -> dict[str, Any] | None:
    """Three epochs of `make_update` (one, of 24 updates, if so many); None if a process has a batch without images."""
    config = CASES[case]
    plans = [visits for own in SPLIT.values() for update in trial.plan(config, 0, own) for visits in update]
    if not all(map(len, plans)):
        return None  # it would fail in one process, and the other would wait for it
    epochs = 3 if config.optimizer.updates_per_epoch == 1 else 1
    reduced: list[list[int]] = []

    def after_an_update() -> None:
        reduced.append(sizes.copy())
        sizes.clear()

    with Reductions() as sizes:
        parameters, metrics, parts = trial.run(config, epochs, SPLIT[number], after=after_an_update)
    balancer = parts.method.balancer
    kept = {"loss", "kl", "gradient_norm", "alpha", "cosine/applied", "cosine_advantage/fresh", "reward_cosines"}
    return {
        "parameters": parameters,
        "alpha": torch.zeros(0) if balancer is None else balancer.alpha,
        "metrics": [{key: each[key] for key in sorted(kept & each.keys())} for each in metrics],
        "reduced": reduced,
        "count": parts.engine.count,
    }


ROWS = torch.tensor([[0.1, -0.0, torch.nan], [torch.inf, 1e-310, -2.0], [3.0, 0.0, 7.0]], dtype=torch.float64)


def helpers() -> dict[str, Any]:
    """What the helpers answer here."""
    own = share(len(ROWS))
    mine = ROWS[own.start : own.stop]
    first = range(len(ROWS)) if is_main() else range(len(ROWS), len(ROWS))  # the other has none, of another shape

    def mistaken() -> None:
        raise MarbleError("found by the main one")

    try:
        decide(mistaken)
        said = ""
    except MarbleError as error:
        said = str(error)
    return {
        "who": [rank(), world(), is_main()],
        "own": list(own),
        "float64": gather_rows(mine, own, len(ROWS)),
        "bool": gather_rows(mine > 1, own, len(ROWS)),
        "uint8": gather_rows(mine.clamp(0, 5).to(torch.uint8)[:, :, None], own, len(ROWS)),
        "half": gather_rows(mine[:, 0].half(), own, len(ROWS)),
        "one has all": gather_rows(ROWS if is_main() else torch.empty(0, dtype=ROWS.dtype), first, len(ROWS)),
        "agreed": [agree(is_main()), agree(not is_main())],
        "decided": decide(lambda: {"rank": rank(), "numbers": [1, 2.5, None]}),
        "said": said,
        "spread": list(spread(bytes(range(7)) if is_main() else b"")),
        "nothing": list(spread(b"")),
    }


def run_all(number: int, folder: Path, trial: Trial) -> dict[str, Any]:
    """Every run as one of two processes that meet in `folder`."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=timedelta(seconds=PATIENCE))
    try:
        results = {"toy": toy_run(OWN[number]), "helpers": helpers()} | {
            case: pipeline_run(trial, case, number) for case in CASES
        }
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return results


def fail_in(number: int) -> None:
    """A command of which one process fails while the others wait for it."""
    distributed._GRACE = 2.0
    with distributed.together():
        if rank() == number or number == -1:
            raise MarbleError("no such thing")
        distributed.barrier()


def sharded_gradients(name: str, samples: int, *, shard: bool) -> dict[str, Tensor]:
    """A tiny model's output and every reward's gradient for the samples of this process, by the engine and by autograd.

    Args:
        name: one of `tiny.MODELS`.
        samples: how many.
        shard: whether the base is in shards.
    """
    model = add_lora(build(name), LINEARS[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    if shard:
        shard_base(model, trained, torch.device("cpu"))
    inputs = inputs_of(name, samples, seed=rank())
    advantages = torch.randn(samples, 2, generator=torch.Generator().manual_seed(rank()))
    with torch.no_grad():
        output = predict(model, inputs)
    gradients = []
    engine = PerRewardGradients(model, parameters=trained)
    for _ in range(2):  # the first looks at the module with more backward passes
        with engine:
            gradients.append(engine.compute(loss_of(predict(model, inputs)), advantages, retain_graph=False))
    loss = loss_of(predict(model, inputs))
    loss.at(advantages[:, 0]).mean().backward()
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return {
        "output": output,
        "first": gradients[0],
        "second": gradients[1],
        "autograd": torch.cat([p.grad.flatten() for p in trained if p.grad is not None]),
        "numbers": torch.tensor(sum(p.numel() for p in parts)),
        "trained": torch.tensor(sum(p.numel() for p in trained)),
    }


def shard_all(folder: Path) -> None:
    """Every tiny model with a base in shards, and whole."""
    with distributed.together():
        found = {
            name: [sharded_gradients(name, 3, shard=shard) for shard in (False, True)]
            for name in ("sd3", "flux", "unet")
        }
        torch.save(found, folder / f"{rank()}.pt")


if __name__ == "__main__" and sys.argv[1] == "shard":
    torch.set_num_threads(1)
    shard_all(Path(sys.argv[2]))
    distributed.leave(0)
elif __name__ == "__main__" and sys.argv[1] == "fail":
    torch.set_num_threads(1)
    try:
        fail_in(int(sys.argv[2]))
    except MarbleError as error:
        print(f"said: {error}", flush=True)
        sys.exit(2)
elif __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    torch.save(run_all(1, here, Trial.of(Path(sys.argv[2]))), here / "other.pt")
