"""Where records come from: registered generators, and plain files."""

from __future__ import annotations

import json
from pathlib import Path

from marble.errors import MarbleError
from marble.prompts.record import Record
from marble.registry import is_file, resolve

_FILE_SHARE_HELD_OUT = 5  # every fifth line of a file is held out


def load_source(source: str, split: str) -> list[Record]:
    """All records of one split, in a fixed order; the two splits share no prompt text.

    Args:
        source: a registered name, `package.module:function` (called with the split), or a file:
            `.txt` with a prompt a line, `.jsonl` with `{"text": …, "targets": …}` a line.
        split: `train` or `held-out`.

    Raises:
        MarbleError: unknown source, missing file, a line that cannot be read, or nothing in it.
    """
    records = _read_file(Path(source), split) if is_file(source) else list(resolve("prompt source", source)(split))
    if not records:
        raise MarbleError(f'prompt source "{source}" has no prompts in its {split} split')
    return records


def _read_file(path: Path, split: str) -> list[Record]:
    if not path.is_file():
        raise MarbleError(f'prompt file "{path}" does not exist')
    records: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            record = Record(line.strip(), path.stem)
        else:
            try:
                row = json.loads(line)
                record = Record(str(row["text"]), path.stem, dict(row.get("targets", {})))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise MarbleError(
                    f'{path}, line {number}: not of the form {{"text": …, "targets": …}} ({error})'
                ) from error
        records.setdefault(record.text, record)
    rows = list(records.values())
    if len(rows) < _FILE_SHARE_HELD_OUT:
        raise MarbleError(
            f'prompt file "{path}" has {len(rows)} different prompts; at least 5 are needed to hold some out'
        )
    held_out = split == "held-out"
    return [row for i, row in enumerate(rows) if (i % _FILE_SHARE_HELD_OUT == 0) == held_out]
