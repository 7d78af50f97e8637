"""What a pipeline gave its denoiser beside latents and timestep, kept to be given again in training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from marble.watch.manner import Manner
from marble.watch.tree import KEEP, Path, name_of, rebuild, same


@dataclass(frozen=True)
class Table:
    """The arguments of calls that are alike in shape: a row per prompt where they differ between prompts."""

    per_prompt: dict[Path, Tensor | list]  # each [P, …], or P things of shapes of their own
    shared: dict[str, Any]  # the whole arguments, with None where `per_prompt` stands

    @property
    def length(self) -> int:
        """P; 0 if nothing differs between prompts."""
        return len(next(iter(self.per_prompt.values()), ()))

    def like(self, other: Table) -> bool:
        """Whether both could come from one call."""
        return (
            self.per_prompt.keys() == other.per_prompt.keys()
            and all(_shape(value) == _shape(other.per_prompt[path]) for path, value in self.per_prompt.items())
            and same(self.shared, other.shared)
        )

    def arguments(self, rows: Tensor | None = None) -> dict[str, Any]:
        """The arguments for images of the given rows, of all rows if None."""

        def filled(path: Path, node: Any) -> Any:
            if path not in self.per_prompt:
                return KEEP
            value = self.per_prompt[path]
            return value if rows is None else _take(value, rows)

        return rebuild(self.shared, filled)


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's other arguments for N images.

    Text is kept once per prompt, not once per image. Calls whose texts were padded to different lengths have
    different tables; images of different tables cannot be in one call of the denoiser.
    """

    manner: Manner
    tables: tuple[Table, ...]
    table_of: Tensor  # [N] int64
    rows: Tensor  # [N] int64, in its table

    def __getitem__(self, images: Tensor) -> Conditioning:
        """The conditioning of some of the images."""
        return replace(self, table_of=self.table_of[images], rows=self.rows[images])

    def expanded(self) -> Conditioning:
        """The same with a row per image, for several calls on the same images.

        Raises:
            ValueError: the images are of several tables.
        """
        first = int(self.table_of[0])
        if (self.table_of != first).any():
            raise ValueError("images whose texts have different shapes cannot be in one call of the denoiser")
        table = self.tables[first]
        per_image = {path: _take(value, self.rows) for path, value in table.per_prompt.items()}
        rows = torch.arange(len(self.rows))
        return Conditioning(self.manner, (replace(table, per_prompt=per_image),), torch.zeros_like(rows), rows)

    def call(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Call `denoiser` as the pipeline did, with other latents and timesteps; see `Manner.call`."""
        whole = self if self._is_expanded() else self.expanded()
        return self.manner.call(denoiser, whole.tables[0].arguments(), latents, timesteps)

    def _is_expanded(self) -> bool:
        if len(self.tables) != 1:
            return False
        values = self.tables[0].per_prompt.values()
        return all(len(value) == len(self.rows) for value in values) and torch.equal(
            self.rows, torch.arange(len(self.rows))
        )

    @staticmethod
    def of_call(manner: Manner, arguments: dict[str, Any], count: int, each: int | None = None) -> Conditioning:
        """Of one call with `count` images, in which the `each` images of a prompt stand together.

        Without `each`, neighbours that are equal count as one prompt's.
        """
        per_image: dict[Path, Tensor | list] = {}

        def taken_out(path: Path, node: Any) -> Any:
            if path not in manner.per_image or node is None:
                return KEEP
            entries = node.movedim(manner.dims[path], 0) if path in manner.dims else node
            per_image[path] = repeated(entries, count, path)
            return None

        own = (manner.latent, manner.timestep)
        kept = {name: value for name, value in arguments.items() if name not in own}
        if manner.timestep_dims == 2:  # its length is wanted again
            kept[manner.timestep] = arguments[manner.timestep][:1].detach()
        shared = rebuild(kept, taken_out)
        if each is None:
            rows, first = _distinct(per_image, count)
        else:
            rows, first = torch.arange(count) // each, torch.arange(0, count, each)
        per_prompt = {path: _take(value, first) for path, value in per_image.items()}
        return Conditioning(manner, (Table(per_prompt, shared),), torch.zeros_like(rows), rows)

    @staticmethod
    def join(parts: list[Conditioning]) -> Conditioning:
        """Of several calls of one pipeline, in order; tables that are alike become one."""
        gathered: list[list[Table]] = []
        lengths: list[int] = []
        table_of, rows = [], []
        for part in parts:
            number = torch.empty(len(part.tables), dtype=torch.int64)
            offset = torch.empty_like(number)
            for t, table in enumerate(part.tables):
                which = next((i for i, found in enumerate(gathered) if found[0].like(table)), len(gathered))
                if which == len(gathered):
                    gathered.append([])
                    lengths.append(0)
                number[t], offset[t] = which, lengths[which]
                gathered[which].append(table)
                lengths[which] += table.length or int(part.rows[part.table_of == t].max()) + 1
            table_of.append(number[part.table_of])
            rows.append(part.rows + offset[part.table_of])
        tables = tuple(_joined(found) for found in gathered)
        return Conditioning(parts[0].manner, tables, torch.cat(table_of), torch.cat(rows))


def _joined(tables: list[Table]) -> Table:
    values: dict[Path, Tensor | list] = {}
    for path, first in tables[0].per_prompt.items():
        each: list[Any] = [table.per_prompt[path] for table in tables]
        values[path] = torch.cat(each) if isinstance(first, Tensor) else [item for part in each for item in part]
    return Table(values, tables[0].shared)


def _shape(value: Tensor | list) -> object:
    return (value.shape[1:], value.dtype) if isinstance(value, Tensor) else "list"


def _take(value: Tensor | list, rows: Tensor) -> Tensor | list:
    return value[rows.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]


def repeated(value: Any, count: int, path: Path) -> Tensor | list:
    """An entry for every image, of a value with one for every image or every prompt."""
    entries = len(value)
    if entries == 0 or count % entries:
        raise ValueError(f"{name_of(path)} has {entries} entries for {count} images")
    value = value.detach() if isinstance(value, Tensor) else list(value)
    return value if entries == count else _take(value, torch.arange(count) // (count // entries))


def _distinct(per_image: dict[Path, Tensor | list], count: int) -> tuple[Tensor, Tensor]:
    """Which of the images' neighbouring rows are the same: row of each image `[N]`, first image of each row `[P]`."""
    new = torch.zeros(count, dtype=torch.bool)
    new[0] = True
    for value in per_image.values():
        if isinstance(value, Tensor):
            unlike = [(a != b).any() for a, b in itertools.pairwise(value)]  # one by one: texts are large
            if unlike:
                new[1:] |= torch.stack(unlike).cpu()
        else:
            new[1:] |= torch.tensor([not same(a, b) for a, b in itertools.pairwise(value)], dtype=torch.bool)
    return new.cumsum(0) - 1, new.nonzero().flatten()
