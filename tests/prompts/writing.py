"""Prompt files, and the texts in them."""

import json

from marble.prompts import load_source


def things(*numbers):
    return [f"thing {n}" for n in numbers]


def written(path, lines):
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def texts(source, split="train"):
    return [record.text for record in load_source(source, split)]


def folder(path, **splits):
    path.mkdir()
    for split, rows in splits.items():
        written(path / f"{split}.jsonl", rows)
    return f"hf:{path}"
