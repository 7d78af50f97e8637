"""A comparison's tables as text, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = (
    "Gains are in spreads: standard deviations of the base model's scores. ±: 95% interval over seeds; [ ]: of a "
    "single seed, 95% over prompts, which says nothing of what another seed would bring. All seeds are judged on the "
    "same prompts: intervals over seeds hold on these prompts. The composite z is the mean over all rewards of each "
    "mean's z-score among the rows, seed by seed where all arms share two; it depends on who is in the table. Worst "
    "gain: the "
    "smallest over the training rewards, seed by seed. Hypervolume: product of the training rewards' gains, 0 if one "
    "is below the base model."
)
COST_NOTE = (
    "Minutes of training, evaluations on the way included; memory at the peak, of tensors on a GPU and of the whole "
    "process on the CPU. Worst cosine: of the applied update with the gradient of the reward that it serves worst, "
    "advantage part, mean over what was measured; and how often it was negative."
)


def told(found: Mapping[str, Any] | None, digits: int = 2, *, sign: bool = True, scale: float = 1.0) -> str:
    """`+0.21 ± 0.09` over seeds, `+0.21 [+0.12, +0.30]` over the prompts of one, `–` for nothing."""
    if found is None or found["mean"] is None:
        return "–"
    mean = number(found["mean"] * scale, digits, sign=sign)
    if found["low"] is not None:
        return f"{mean} ± {number((found['high'] - found['low']) / 2 * scale, digits, sign=False)}"
    low, high = found.get("prompts") or (None, None)
    if low is None or high is None:
        return mean
    return f"{mean} [{number(low * scale, digits, sign=sign)}, {number(high * scale, digits, sign=sign)}]"


def number(value: float | None, digits: int = 2, *, sign: bool = True) -> str:
    """A number with a real minus, and with a plus if signed."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def ranked(content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Arms that have a row, the highest composite z first."""
    rows = [(name, arm["summary"]) for name, arm in content["arms"].items() if arm["summary"]]
    return sorted(rows, key=lambda row: -row[1]["composite_z"])


def standings(content: Mapping[str, Any]) -> list[list[str]]:
    """Arms by what they gain; the first row is the headings."""
    over = f"over {content['baseline']}" if content["baseline"] else "relative"
    rows = [["arm", "seeds", "mean gain", "worst gain", "composite z", over, "hypervolume", "below base"]]
    for name, row in ranked(content):
        worst = f" ({row['worst_gain']['reward']})" if row["worst_gain"]["reward"] else ""
        relative = "–" if name == content["baseline"] else told(row["relative"], 1, scale=100)
        rows.append(
            [
                name,
                str(row["seeds"]),
                told(row["mean_gain"]),
                told(row["worst_gain"]) + worst,
                told(row["composite_z_seeds"] | {"mean": row["composite_z"]}),
                relative if relative == "–" else f"{relative} %",
                told(row["hypervolume"], 3, sign=False),
                f"{len(row['below_base'])}" + (f" ({', '.join(row['below_base'])})" if row["below_base"] else ""),
            ]
        )
    return rows


def costs(content: Mapping[str, Any]) -> list[list[str]]:
    """Arms by what they took, images and updates from the fewest to the most; the first row is the headings."""
    rows = [["arm", "minutes", "memory", "images", "updates", "worst cosine", "negative in"]]
    for name, row in ranked(content):
        cosine, negative = row["cosine"]["mean"], row["cosine"]["negative"]
        rows.append(
            [
                name,
                "–" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
                "–" if row["memory"] is None else f"{row['memory'] / 2**30:.2f} GiB",
                _range(content, name, "images"),
                _range(content, name, "updates"),
                number(cosine),
                "–" if negative is None else f"{100 * negative:.0f}%",
            ]
        )
    return rows


def _range(content: Mapping[str, Any], name: str, key: str) -> str:
    """`180`, or `90 to 180` where an arm's cells differ."""
    made = [cell[key] for cell in content["arms"][name]["seeds"].values() if key in cell]
    return str(made[0]) if min(made) == max(made) else f"{min(made)} to {max(made)}"


def scores(content: Mapping[str, Any]) -> list[list[str]]:
    """Mean scores of the base model and of all arms by reward; the first row is the headings."""
    held_out = content["held_out_rewards"]
    rewards = [*content["training_rewards"], *held_out]
    rows = [["arm", *(f"{name} (held out)" if name in held_out else name for name in rewards), "composite z"]]
    base = [number(content["base"].get(name), 3, sign=False) for name in rewards]
    rows.append(["base model", *base, number(content["base_composite_z"])])
    for name, row in ranked(content):
        means = [told(row["means"][reward], 3, sign=False) for reward in rewards]
        rows.append([name, *means, number(row["composite_z"])])
    return rows
