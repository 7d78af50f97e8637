"""Data sets as prompts: rows of files and of the Hugging Face hub as records, and the data sets known by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marble.errors import MarbleError, first_line, nearest
from marble.prompts.record import Record

COLUMNS = ("prompt", "text", "caption")
"""Where a row's text is looked for, in this order."""
TARGETS = ("targets", "tag", "include", "exclude")
"""What else of a row is read: our own targets, or GenEval's metadata."""


@dataclass(frozen=True)
class DataSet:
    """Prompts of a data set of the Hugging Face hub, or of a local folder that `datasets` can read."""

    path: str
    """`owner/name`, or a folder: `./…`, `../…`, `/…`, `~/…`."""
    source: str
    """What its records say they come from."""
    subset: str | None = None
    column: str | None = None
    """Of the texts; the first there is of `COLUMNS`, if None."""
    split: str = "train"
    """To train on."""
    held_out_split: str | None = None
    """To hold out; if None, whoever divides the prompts does."""
    about: str = ""
    """One line for `marble list prompts`."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.path.startswith((".", "/", "~"))

    def read(self, split: str) -> list[Record]:
        """The different prompts of one of its own splits, in order; downloaded, unless the cache has it.

        Raises:
            MarbleError: no such data set, subset, split or column, no network, or targets that cannot be read.
        """
        table = self._table(split)
        column = self._column(table.column_names)
        kind = getattr(table.features[column], "dtype", None)
        if kind not in ("string", "large_string"):
            raise MarbleError(f'data set "{self.path}": column "{column}" holds {kind or "lists"}, not texts')
        more = [name for name in TARGETS if name in table.column_names]
        if "targets" not in more and not {"tag", "include"} <= set(more):
            texts = table.unique(column)  # much faster than row by row
            return [Record(text.strip(), self.source) for text in texts if text and text.strip()]
        records = {}
        for number, row in enumerate(table.select_columns([column, *more])):
            if row[column] and row[column].strip() not in records:
                try:
                    record = record_of(row, self.source, column)
                except (MarbleError, ValueError, TypeError) as error:
                    raise MarbleError(f'data set "{self.path}", split {split}, row {number}: {error}') from error
                records[record.text] = record
        return list(records.values())

    def _table(self, split: str) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise MarbleError(
                f'data set "{self.path}": needs datasets: pip install "marble-diffusion[rewards]"'
            ) from error
        path = str(Path(self.path).expanduser()) if self.is_local else self.path
        if self.is_local and not Path(path).is_dir():
            raise MarbleError(f'data set "{self.path}": there is no such folder')
        try:
            return load_dataset(path, self.subset, split=split)
        except Exception as error:  # whatever the hub, a builder or a file's format comes to
            reason = first_line(error)
            named = f', subset "{self.subset}"' if self.subset else ""
            raise MarbleError(f'cannot load the data set "{self.path}"{named}, split "{split}": {reason}') from error

    def _column(self, there: list[str]) -> str:
        if self.column is not None and self.column not in there:
            raise MarbleError(
                f'data set "{self.path}": column: there is no column "{self.column}".'
                f"{nearest(self.column, there)} Columns: {', '.join(there)}"
            )
        found = self.column or next((name for name in COLUMNS if name in there), None)
        if found is None:
            raise MarbleError(
                f'data set "{self.path}": no column is called {", ".join(COLUMNS[:-1])} or {COLUMNS[-1]}; say which '
                f"holds the texts: give column. Columns: {', '.join(there)}"
            )
        return found


def record_of(row: Mapping[str, Any], source: str, column: str | None = None) -> Record:
    """A row as a record: its text, and its targets if it has `targets` or is a line of GenEval's metadata.

    Args:
        row: `{"text": …}`, `{"prompt": …}` or `{"caption": …}`, whichever comes first in `COLUMNS`.
        source: what the record says it comes from.
        column: of the text, if not one of those.

    Raises:
        MarbleError: GenEval's metadata cannot be read.
        TypeError, ValueError: there is no text, or targets are no mapping.
    """
    column = column or next((name for name in COLUMNS if name in row), "text")
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{column} must be a text, got {text!r}")
    targets = row.get("targets")
    if targets is None and "tag" in row and "include" in row:
        from marble.prompts.coco import targets_of

        metadata = {key: _without_none(row[key]) for key in ("tag", "include", "exclude") if row.get(key) is not None}
        return Record(text.strip(), source, targets_of(metadata))
    if isinstance(targets, str):
        targets = json.loads(targets)
    if targets is not None and not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping, got {targets!r}")
    return Record(text.strip(), source, dict(_without_none(targets or {})))


def _without_none(value: Any) -> Any:
    """Plain data without the keys that a table has only because other rows have them."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


pickscore = DataSet(
    path="yuvalkirstain/pickapic_v1_no_images",
    source="pickscore",
    column="caption",
    held_out_split="test_unique",
    about="data set: what users of Pick-a-Pic v1 asked for (a download of 170 MB); 500 prompts held out",
)
"""The prompts of Pick-a-Pic v1 (Kirstain et al. 2023), without its images, every prompt once. Much of it is adult
content, most of which the safety filter leaves out. Published runs train on a selection of 25 432 of them and test on
2 048, which Flow-GRPO's repository carries as text files: give those as `.txt` sources to compare with them."""
