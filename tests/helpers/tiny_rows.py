"""Rows of random words in files of every form, and what a recipe says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from tiny_models import VOCABULARY, save_teacher

Row = dict[str, Any]
COLUMNS = ("query", "positive", "negative")


def random_rows(count: int = 60, *, longest: int = 20, seed: int = 0) -> list[Row]:
    """A query, two texts and scores of both; the same texts as a list."""
    generator = torch.Generator().manual_seed(seed)

    def words() -> str:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    rows: list[Row] = []
    for _ in range(count):
        row: Row = {column: words() for column in COLUMNS}
        row["passages"] = [row["positive"], row["negative"]]
        row["scores"] = [round(s, 3) for s in torch.rand(2, generator=generator).tolist()]
        row["good"], row["bad"] = row["scores"]
        rows.append(row)
    return rows


def recipe_rows() -> list[Row]:
    """Those of `row_recipe`, some of which take half the tokens of others."""
    return random_rows(longest=10)


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as the name of the file says; one without an ending is a saved data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif not path.suffix:
        Dataset.from_list(rows).save_to_disk(str(path))
    else:
        plain = [name for name, value in rows[0].items() if not isinstance(value, list)]
        tab = path.suffix == ".tsv"
        with path.open("w", encoding="utf-8", newline="") as file:
            quoting = csv.QUOTE_NONE if tab else csv.QUOTE_ALL
            writer = csv.writer(file, delimiter="\t" if tab else ",", quoting=quoting)
            writer.writerow(plain)
            writer.writerows([row[name] for name in plain] for row in rows)
    return path


def row_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe of rows of three texts, with its teacher and its file; sections update it."""
    if not (folder / "teacher").is_dir():
        save_teacher(folder / "teacher")
    tree: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"layers": 2, "hidden_size": 24, "intermediate_size": 48},
        "losses": {"attention": {}, "hidden": {}},
        "data": {
            "train": str(write_rows(folder / "rows.jsonl", recipe_rows())),
            "documents": "row",
            "columns": list(COLUMNS),
            "heldout_fraction": 0.3,
            "block_size": 16,
            "workers": 0,
            "cache": str(folder / "cache"),
        },
        "train": {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1},
        "run": {"output": str(folder / "run")},
    }
    for name, values in sections.items():
        tree[name] = values if name == "losses" else {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
