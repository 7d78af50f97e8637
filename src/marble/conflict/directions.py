"""How rewards disagree in their gradients: norms, cosines, and whom a direction works against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marble.conflict.across import AcrossBatches, Estimate, true_cosines
from marble.diagnose import direction_cosines, fresh_mixture, reward_cosines
from marble.statistics import bootstrap_interval, share_interval

DIRECTIONS = {
    "weighted_sum": "weighted sum of raw scores",
    "standardised_sum": "sum of standardised advantages",
    "uniform": "equal weights on unit gradients",
    "fresh": "balanced: min-norm, solved on this batch",
}
"""Keys in conflict.json, and what they are."""
KINDS = {"advantage": "cosine_advantage", "whole": "cosine"}
KEPT = 0.9
"""Share of the updates whose weights must make a sure direction of the true gradients for a mean over these."""


def describe_gradients(
    names: Sequence[str], grams: Sequence[Sequence[Tensor]], signal: Sequence[Tensor], across: AcrossBatches
) -> dict[str, Any]:
    """Everything that conflict.json says of the gradients; every key has a line in `docs/metrics.md`.

    Args:
        names: K rewards.
        grams: `[R, R]` an update, batch after batch; R = K + 2: own parts, the raw weighted sum's, the common one.
        signal: `[K]` bool a batch.
        across: the same rows, averaged over a batch's updates.
    """
    count = len(names)
    square = across.jackknife(lambda gram: gram.diagonal()[:count])
    known = (square.interval()[0] > 0) & torch.stack(list(signal)).any(dim=0)
    return {
        "norms": _norms(names, grams, signal, square, known),
        "cosines_one_batch": _seen_cosines(count, grams, signal),
        "cosines_true": _true_cosines(count, across, known),
        "pull": _pull(count, grams),
        "directions": _directions(names, grams, signal, across, known),
    }


def mixtures(gram: Tensor, signal: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The directions that are compared, as mixtures of the rows: whole, and without the common row.

    Args:
        gram: `[R, R]` as for `describe_gradients`.
        signal: `[K]` bool; the others take no part.
    """
    gram, count = gram.double(), len(signal)
    every = torch.eye(len(gram), dtype=torch.float64)
    own, raw, common = every[:count], every[count], every[-1]
    norms = gram.diagonal()[:count].clamp_min(0).sqrt()
    usable = signal & (norms > 0)
    units = torch.where(usable, 1 / norms, 0.0)
    shares = {
        "weighted_sum": raw,
        "standardised_sum": own.mean(dim=0),
        "uniform": units / units.sum() @ own if usable.any() else 0 * raw,
    }
    return {name: (mixture + common, mixture) for name, mixture in shares.items()}


def _parts(count: int) -> Tensor:
    """`[K + 1, R]`: the rewards' own parts and the common one as mixtures of the rows."""
    return torch.eye(count + 2, dtype=torch.float64)[[*range(count), count + 1]]


def _norms(
    names: Sequence[str], grams: Sequence[Sequence[Tensor]], signal: Sequence[Tensor], square: Estimate, known: Tensor
) -> dict[str, Any]:
    low, high = (end.clamp_min(0).sqrt().tolist() for end in square.interval())
    true = square.value.clamp_min(0).sqrt().tolist()
    out = {}
    for k, name in enumerate(names):
        squares = [np.array([gram[k, k].item() for gram in batch]) for batch in grams]
        row: dict[str, Any] = {"one_batch": None, "low": None, "high": None}
        if any(speaks[k] for speaks in signal):
            each = np.array([np.sqrt(batch).mean() for batch in squares])
            row["one_batch"] = float(each.mean())
            row["low"], row["high"] = bootstrap_interval(each)
        row |= {"true": true[k], "true_low": low[k], "true_high": high[k], "known": bool(known[k])}
        row["shown"] = true[k] / row["one_batch"] if known[k] else None
        noise = max(float(np.concatenate(squares).mean()) - true[k] ** 2, 0.0)
        row["batches_needed"] = noise / true[k] ** 2 if known[k] else None
        out[name] = row
    return out


def _seen_cosines(count: int, grams: Sequence[Sequence[Tensor]], signal: Sequence[Tensor]) -> dict[str, Any]:
    """`[K, K]` cosines of one update: means over batches with 95% intervals, batches resampled."""
    seen = []
    for batch, speaks in zip(grams, signal, strict=True):
        mean = torch.stack([reward_cosines(gram[:count, :count]) for gram in batch]).mean(dim=0)
        seen.append(torch.where(speaks[:, None] & speaks, mean, torch.nan))
    stacked = torch.stack(seen).numpy()
    out: dict[str, Any] = {key: [[None] * count for _ in range(count)] for key in ("mean", "low", "high")}
    for i in range(count):
        for j in range(count):
            each = stacked[:, i, j][~np.isnan(stacked[:, i, j])]
            if len(each):
                low, high = bootstrap_interval(each)
                out["mean"][i][j], out["low"][i][j], out["high"][i][j] = float(each.mean()), low, high
    return out


def _true_cosines(count: int, across: AcrossBatches, known: Tensor) -> dict[str, Any]:
    """`[K, K]` cosines of the true gradients, and how sure it is that two conflict.

    The sign of a product is surer than a cosine, and is judged with an allowance for the number of pairs.
    """
    pairs = max(1, count * (count - 1) // 2)
    cosines = across.jackknife(lambda gram: true_cosines(gram[:count, :count]))
    sign = across.jackknife(lambda gram: gram[:count, :count])
    below, above = sign.interval(1 - 0.05 / pairs)
    both = known[:, None] & known
    fine = both & cosines.error.isfinite()
    low, high = cosines.interval()
    return {
        "estimate": _nested(cosines.value.clamp(-1, 1), both),
        "low": _nested(low.clamp(-1, 1), fine),
        "high": _nested(high.clamp(-1, 1), fine),
        "conflict": ((above < 0) & both).tolist(),
        "agree": ((below > 0) & both).tolist(),
    }


def _pull(count: int, grams: Sequence[Sequence[Tensor]]) -> float:
    """Norm of the part that no advantage enters, over the mean norm of the rewards' own parts."""
    every = [gram.diagonal().clamp_min(0).sqrt() for batch in grams for gram in batch]
    own = torch.stack([norms[:count].mean() for norms in every]).mean()
    return (torch.stack([norms[-1] for norms in every]).mean() / own).item() if own > 0 else 0.0


def _directions(
    names: Sequence[str],
    grams: Sequence[Sequence[Tensor]],
    signal: Sequence[Tensor],
    across: AcrossBatches,
    known: Tensor,
) -> dict[str, Any]:
    looks = [
        [_look(gram, speaks & (gram.diagonal()[: len(names)] > 0), across, known) for gram in batch]
        for batch, speaks in zip(grams, signal, strict=True)
    ]
    looks = [[look for look in batch if look] for batch in looks]
    looks = [batch for batch in looks if batch]
    truth = {
        "cosines": across.jackknife(lambda gram: _all_on_truth(gram, known)),
        "products": across.jackknife(lambda gram: _products(_made_of_truth(gram, known), gram)),
    }
    out: dict[str, Any] = {}
    for at, name in enumerate(DIRECTIONS):
        out[name] = {kind: _opposed(names, _pick(looks, f"{key}/{name}")) for kind, key in KINDS.items()}
        out[name]["kept"] = _kept(_pick(looks, f"kept/{name}"))
        out[name]["true"] = _on_average(names, truth, at, known)
    return out


def _look(gram: Tensor, speaks: Tensor, across: AcrossBatches, known: Tensor) -> dict[str, np.ndarray]:
    """`[K]` cosines of one update's directions: with its own gradients, and as `kept/D` with the true ones.

    Empty if no reward has a signal; `kept/D` is NaN where the weights make of the true gradients no direction that is
    surely longer than 0.
    """
    if not speaks.any():
        return {}
    parts, given = _parts(len(speaks)), mixtures(gram, speaks)
    found = {key: values.numpy() for key, values in direction_cosines(gram, parts, speaks, given).items()}
    if known.any():
        solved = fresh_mixture(parts[:-1][speaks], gram)
        given["solved"] = solved, solved
        made = torch.stack([mixture for _, mixture in given.values()])
        squares = across.jackknife(lambda truth: _products(made, truth)[:, -1])
        long = squares.interval()[0] > 0
        on_truth = direction_cosines(across.gram(), parts, known, given)
        for name, key, sure in zip(DIRECTIONS, given, long, strict=True):
            cosines = on_truth[f"cosine_advantage/{key}"].clamp(-1, 1)
            found[f"kept/{name}"] = torch.where(sure, cosines, torch.nan).numpy()
    return found


def _kept(batches: list[list[np.ndarray]]) -> float | None:
    """Mean smallest of `[K]` cosines an update; None if too many updates have none."""
    each = [cosines for batch in batches for cosines in batch]
    sure = [float(np.nanmin(cosines)) for cosines in each if not np.isnan(cosines).all()]
    return float(np.mean(sure)) if sure and len(sure) >= KEPT * len(each) else None


def _pick(looks: list[list[dict[str, np.ndarray]]], key: str) -> list[list[np.ndarray]]:
    return [[look[key] for look in batch] for batch in looks if key in batch[0]]


def _opposed(names: Sequence[str], batches: list[list[np.ndarray]]) -> dict[str, Any] | None:
    """Whom a direction works against, in `[K]` cosines with the rewards of each update; None without any."""
    if not batches:
        return None
    worst = [[float(np.nanmin(cosines)) for cosines in batch] for batch in batches]
    share = float(np.mean([np.mean(np.array(batch) < 0) for batch in worst]))
    low, high = share_interval(share, len(worst))
    every = np.array([cosines for batch in batches for cosines in batch])
    means = np.array([np.mean(batch) for batch in worst])
    below, above = bootstrap_interval(means)
    judged = ~np.isnan(every)
    against = {name: float((every[judged[:, k], k] < 0).mean()) for k, name in enumerate(names) if judged[:, k].any()}
    return {
        "conflict_rate": share,
        "conflict_rate_low": low,
        "conflict_rate_high": high,
        "worst": float(means.mean()),
        "worst_low": below,
        "worst_high": above,
        "against": against,
        "worst_by_update": worst,
    }


def _all_on_truth(gram: Tensor, known: Tensor) -> Tensor:
    """`[D, K]`: cosines of every direction, made of the true gradients, with each of them; NaN where not known."""
    usable = known & (gram.diagonal()[: len(known)] > 0)
    if not usable.any():
        return torch.full((len(DIRECTIONS), len(known)), torch.nan, dtype=torch.float64)
    found = direction_cosines(gram, _parts(len(known)), usable, mixtures(gram, usable))
    return torch.stack([found[f"cosine_advantage/{name}"] for name in DIRECTIONS])


def _made_of_truth(gram: Tensor, known: Tensor) -> Tensor:
    """`[D, R]`: every direction, made of the true gradients, as a mixture of the rows; NaN if none is known."""
    usable = known & (gram.diagonal()[: len(known)] > 0)
    if not usable.any():
        return torch.full((len(DIRECTIONS), len(gram)), torch.nan, dtype=torch.float64)
    made = [mixture for _, mixture in mixtures(gram, usable).values()]
    return torch.stack([*made, fresh_mixture(_parts(len(known))[:-1][usable], gram)])


def _products(made: Tensor, gram: Tensor) -> Tensor:
    """`[D, R + 1]`: products of the mixtures `[D, R]` with every row, and with themselves."""
    with_rows = made @ gram
    return torch.cat([with_rows, (with_rows * made).sum(dim=1, keepdim=True)], dim=1)


def _on_average(names: Sequence[str], truth: Mapping[str, Estimate], at: int, known: Tensor) -> dict[str, Any] | None:
    """Cosines of one direction on the true gradients, with the reward that it serves worst.

    None if the direction is not surely longer than 0. Whom it works against is judged by the products' signs, with an
    allowance for the number of rewards.
    """
    cosines, products = truth["cosines"], truth["products"]
    if not products.interval()[0][at, -1] > 0:
        return None
    values = cosines.value[at]
    low, high = (end[at].clamp(-1, 1) for end in cosines.interval())
    worst = int(torch.where(known, values, torch.inf).argmin())
    fine = known & cosines.error[at].isfinite()
    opposed = products.interval(1 - 0.05 / int(known.sum()))[1][at, : len(names)] < 0
    return {
        "worst": values[worst].clamp(-1, 1).item(),
        "worst_low": low[worst].item() if fine[worst] else None,
        "worst_high": high[worst].item() if fine[worst] else None,
        "worst_reward": names[worst],
        "against": [name for name, sure in zip(names, opposed & known, strict=True) if sure],
        "cosines": dict(zip(names, _nested(values.clamp(-1, 1), known), strict=True)),
    }


def _nested(values: Tensor, fine: Tensor) -> Any:
    """As nested lists, None where not `fine`."""
    if values.ndim > 1:
        return [_nested(*pair) for pair in zip(values, fine, strict=True)]
    return [value if ok else None for value, ok in zip(values.tolist(), fine.tolist(), strict=True)]
