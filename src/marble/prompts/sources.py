"""Where records come from: generators, files and data sets, divided so that nothing held out is trained on."""

from __future__ import annotations

import functools
import json
import logging
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from marble.config import PromptSource
from marble.errors import MarbleError
from marble.prompts.data_sets import DataSet, record_of
from marble.prompts.record import Record
from marble.prompts.safety import unsafe
from marble.registry import is_data_set, is_file, resolve

log = logging.getLogger("marble")

_HELD_OUT = 5  # every so many of the different prompts of a file are held out
_ENDS = string.punctuation + "“”‘’„«»…–—·¿¡ "

Divided = tuple[tuple[Record, ...], tuple[Record, ...]]
"""Train and held-out."""


def load_source(source: str | PromptSource, split: str) -> list[Record]:
    """All records of one split, in a fixed order; the two splits share no prompt text, however it is spelt.

    Args:
        source: a registered name, `package.module:function` (called with the split); a file: `.txt` with a prompt a
            line, `.jsonl` with `{"text": …, "targets": …}` or a line of GenEval's metadata a line; or a data set:
            `hf:owner/name`, `hf:./folder`. A name alone, or with the settings of a config.
        split: `train` or `held-out`.

    Raises:
        MarbleError: unknown source, missing file or data set, a line that cannot be read, settings that do not fit, or
            nothing in it.
    """
    use = PromptSource(source=source) if isinstance(source, str) else source
    loaded = _loaded(use)
    records = list(loaded[split == "held-out"] if loaded else _generated(use.source, split))
    if not records:
        raise MarbleError(f'prompt source "{use.source}" has no prompts in its {split} split')
    return records


def load_mixture(sources: Sequence[PromptSource]) -> tuple[list[list[Record]], list[list[Record]]]:
    """What to train on and what to hold out, of each source: no text held out by any is trained on from another.

    Raises:
        MarbleError: as `load_source`, or nothing is left of a source to train on.
    """
    held_out, kept = [], set[str]()
    for source in sources:  # one prompt of two sources is held out once: evaluated twice it would count as two
        records = load_source(source, "held-out")
        held_out.append([record for record in records if same_as(record.text) not in kept])
        kept |= {same_as(record.text) for record in records}
    train = []
    for source in sources:
        train.append([r for r in load_source(source, "train") if same_as(r.text) not in kept])
        if not train[-1]:
            raise MarbleError(
                f'prompt source "{source.source}": every prompt of its train split is held out by a source of this '
                "mixture; leave one of the two out"
            )
    return train, held_out


def needs_download(source: str | PromptSource) -> bool:
    """Whether loading a source may need the network: data sets of the hub do.

    Raises:
        MarbleError: unknown source.
    """
    data = _data_set(PromptSource(source=source) if isinstance(source, str) else source)
    return data is not None and not data.is_local


@functools.lru_cache(maxsize=65536)
def same_as(text: str) -> str:
    """What texts that count as the same share: their letters in lower case, single spaces, no marks at the ends."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(_ENDS) or plain


def _data_set(use: PromptSource) -> DataSet | None:
    """The data set that a source stands for, if it does."""
    if is_data_set(use.source):
        path = use.source.removeprefix("hf:")
        name = Path(path.rstrip("/")).name
        return DataSet(path, name, use.subset, use.column, use.split, use.held_out_split)
    if is_file(use.source):
        return None
    found = resolve("prompt source", use.source)
    return found if isinstance(found, DataSet) else None


def _loaded(use: PromptSource) -> Divided | None:
    """The two splits of a file or data set, read once a process; None for a generator."""
    if not is_data_set(use.source):
        given = [name for name in ("subset", "column", "split", "held_out_split") if name in use.model_fields_set]
        changed = [name for name in given if getattr(use, name) != PromptSource.model_fields[name].default]
        if changed:
            raise MarbleError(f'prompt source "{use.source}": {changed[0]} is for hf: data sets; leave it out')
    if is_file(use.source):
        path = Path(use.source)
        if not path.is_file():
            raise MarbleError(f'prompt file "{path}" does not exist')
        return _from_file(path, use.safe, _stamp(path))
    data = _data_set(use)
    if data is None:
        return None
    stamp = _stamp(Path(data.path).expanduser()) if data.is_local else ()
    return _from_data_set(data, use.source, use.safe, stamp)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file, or any file in a folder, does."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.absolute()), file.stat()) for file in files if file.is_file()]
    return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats)


@functools.lru_cache(maxsize=64)
def _from_file(path: Path, safe: bool, stamp: object) -> Divided:
    return _filtered(_every_fifth(_read_file(path), f'prompt file "{path}"'), str(path), safe)


@functools.lru_cache(maxsize=64)
def _from_data_set(data: DataSet, name: str, safe: bool, stamp: object) -> Divided:
    records = _different(data.read(data.split))
    if data.held_out_split is None:
        return _filtered(_every_fifth(records, f'prompt source "{name}"'), name, safe)
    held_out = _different(data.read(data.held_out_split))
    train = {key: record for key, record in records.items() if key not in held_out}
    return _filtered((tuple(train.values()), tuple(held_out.values())), name, safe)


def _generated(source: str, split: str) -> list[Record]:
    """What a registered generator or a function of the user's gives for a split."""
    try:
        given = list(resolve("prompt source", source)(split))
        made = [
            Record(each) if isinstance(each, str) else each if isinstance(each, Record) else record_of(each, "")
            for each in given
        ]
    except MarbleError:
        raise
    except Exception as error:  # somebody else's code
        raise MarbleError(
            f'prompt source "{source}" fails for "{split}": {type(error).__name__}: {error}; it must be a function of '
            'the split ("train" or "held-out") that returns records, texts, or mappings with text and targets'
        ) from error
    return [record if record.source else replace(record, source=source) for record in made]


def _different(records: Sequence[Record]) -> dict[str, Record]:
    different: dict[str, Record] = {}
    others = 0
    for record in records:
        others += different.setdefault(same_as(record.text), record).targets != record.targets
    if others:
        log.warning(
            "%s: %d prompts stand there again with other targets, which are not used", records[0].source, others
        )
    return different


def _every_fifth(different: dict[str, Record], what: str) -> Divided:
    if len(different) < _HELD_OUT:
        raise MarbleError(
            f"{what} has {len(different)} different prompts; at least {_HELD_OUT} are needed to hold some out"
        )
    rows = tuple(different.values())
    return tuple(row for i, row in enumerate(rows) if i % _HELD_OUT), rows[::_HELD_OUT]


def _filtered(parts: Divided, name: str, safe: bool) -> Divided:
    """Without what the safety filter objects to; what is held out does not depend on it."""
    kept: list[tuple[Record, ...]] = []
    counts: dict[str, int] = {}
    for part in parts:
        objections = [unsafe(record.text) for record in part]
        dropped = [what is not None and (safe or what == "minors") for what in objections]
        kept.append(tuple(record for record, drop in zip(part, dropped, strict=True) if not drop))
        for what, drop in zip(objections, dropped, strict=True):
            if what is not None and drop:
                counts[what] = counts.get(what, 0) + 1
    if counts:
        left_out, total = sum(counts.values()), sum(map(len, parts))
        detail = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
        rest = "safe: false keeps all but those about minors" if safe else "these are never kept"
        log.warning("%s: the safety filter left out %d of %d prompts (%s); %s", name, left_out, total, detail, rest)
        if left_out == total:
            raise MarbleError(f'prompt source "{name}": the safety filter left out all {total} prompts; {rest}')
    return kept[0], kept[1]


def _read_file(path: Path) -> dict[str, Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise MarbleError(f'prompt file "{path}" is not UTF-8: {error}') from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            records.append(Record(line.strip(), path.stem))
            continue
        try:
            records.append(record_of(dict(json.loads(line)), path.stem))
        except MarbleError as error:
            raise MarbleError(f"{path}, line {number}: {error}") from error
        except (TypeError, ValueError) as error:
            raise MarbleError(
                f'{path}, line {number}: not of the form {{"text": …, "targets": …}} ({error})'
            ) from error
    return _different(records)
