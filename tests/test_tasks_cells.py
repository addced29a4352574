"""Cells of a task's files: one file a split, one column a name, classes and scores of any type."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tasks import SCORES, write_lines

from fastkd.data.tasks import Columns, Task, read_examples
from fastkd.data.tasks.words import read_words
from fastkd.data.text.files import number_in
from fastkd.errors import UserError

TASK = Task(name="t", columns=Columns(texts=("a",), label="y"), labels=("0", "1"))


def table(folder: Path, labels: pa.Array) -> Path:
    pq.write_table(pa.table({"a": ["x"] * len(labels), "y": labels}), folder / "train.parquet")
    return folder


def numbers(task: Task, folder: Path) -> list[float]:
    found: list[float] = read_examples(task, folder, "train", folder).labels.tolist()
    return found


@pytest.mark.parametrize("other", ["train.csv", "train.tsv.gz", "train.parquet"])
def test_two_files_of_a_split_are_refused(other: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", "a\ty", "old\t0")
    write_lines(tmp_path / other, "a,y", "new,1")
    with pytest.raises(UserError, match=rf"train of t stands in train\.tsv and in {other}; expec"):
        numbers(TASK, tmp_path)
    (tmp_path / other).unlink()
    assert numbers(TASK, tmp_path) == [0]


@pytest.mark.parametrize("ending", ["tsv", "csv", "parquet"])
def test_a_column_that_stands_twice_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"train.{ending}"

    def write(names: list[str]) -> None:
        if ending == "parquet":
            columns = [pa.array([cell]) for cell in ("x", "0", "1")]
            pq.write_table(pa.Table.from_arrays(columns, names), path)
        else:
            separator = "\t" if ending == "tsv" else ","
            write_lines(path, *(separator.join(cells) for cells in (names, ["x", "0", "1"])))

    for names in (["a", "y", "y"], ["a", "a", "y"]):
        write(names)
        twice = max(names, key=names.count)
        with pytest.raises(UserError, match=rf"{path.name}.*: column '{twice}' stands twice; ren"):
            numbers(TASK, tmp_path)
    write(["a", "n", "y"])
    assert numbers(TASK, tmp_path) == [1]


def test_classes_of_other_types_are_read_or_refused(tmp_path: Path) -> None:
    assert numbers(TASK, table(tmp_path, pa.array([Decimal(0), Decimal(1)]))) == [0, 1]
    assert numbers(SCORES, table(tmp_path, pa.array([Decimal("0.5"), Decimal(5)]))) == [0.5, 5]
    days = [datetime.date(2020, 1, 1)]
    words = Task(
        name="w",
        kind="token_classification",
        columns=Columns(texts=("t",), label="y"),
        labels=("0", "1"),
    )
    for labels in (pa.array([b"0"]), pa.array(days), pa.array([None], pa.string())):
        with pytest.raises(
            UserError, match=r"train\.parquet, row 1: label .* expected one of 0, 1"
        ):
            numbers(TASK, table(tmp_path, labels))
        with pytest.raises(UserError, match=r"train\.parquet, row 1: score .* expected a number"):
            numbers(SCORES, tmp_path)
        rows = pa.table({"t": [["x"]], "y": pa.array([labels.to_pylist()])})
        pq.write_table(rows, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=r"row 1: class .* in column 'y', expected one of 0, 1"):
            read_words(words, tmp_path, "train", tmp_path)


def test_a_missing_label_is_no_class_of_that_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", '{"a": "x", "y": null}')
    with pytest.raises(UserError, match="line 1: label 'null' of column 'y', expected one of nu"):
        numbers(replace(TASK, labels=("null", "1")), tmp_path)


@pytest.mark.parametrize(
    ("stored", "said"),
    [(5, "holds class 5, expected a number from 0 to 2"), (-1, "holds -1, which stands for no la")],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_class_that_a_table_does_not_have_is_refused(
    stored: int, said: str, listed: bool, tmp_path: Path
) -> None:
    """-1 is no label, also where a class is called so."""
    label = datasets.ClassLabel(names=["-1", "0", "1"])
    features = datasets.Features(
        {
            "a": datasets.List(datasets.Value("string")) if listed else datasets.Value("string"),
            "y": datasets.List(label) if listed else label,
        }
    )
    rows = {"a": [["x"]] if listed else ["x"], "y": [[1]] if listed else [1]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    found = pq.read_table(path)
    wrong = pa.array([[stored] if listed else stored], found.schema.field("y").type)
    pq.write_table(found.set_column(1, found.schema.field("y"), wrong), path)
    task = replace(TASK, labels=("-1", "0", "1"))
    kind = "token_classification" if listed else task.kind
    read = read_words if listed else read_examples
    with pytest.raises(UserError, match=rf"train\.parquet, row 1: column 'y' {said}"):
        read(replace(task, kind=kind, metrics=()), tmp_path, "train", tmp_path)


def test_a_map_that_is_no_label_is_left_alone(tmp_path: Path) -> None:
    """`datasets` has no type for maps."""
    maps = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"a": ["x"], "meta": maps, "y": ["1"]}), tmp_path / "train.parquet")
    assert numbers(TASK, tmp_path) == [1]
    with pytest.raises(UserError, match=r"train\.parquet: column 'meta': Arrow type map"):
        numbers(replace(TASK, columns=Columns(texts=("a",), label="meta")), tmp_path)


@pytest.mark.parametrize("cell", ["1_0", "1" + "0" * 400, 10**400, True, None, [1], "0x1", b"1"])
def test_what_is_no_number(cell: object) -> None:
    assert np.isnan(number_in(cell)) or np.isinf(number_in(cell))


def test_numbers_as_files_spell_them(tmp_path: Path) -> None:
    cells = ["1.5", " 2 ", "1e0", "+3", 4, 2.5, Decimal("0.25")]
    assert [number_in(cell) for cell in cells] == [1.5, 2, 1, 3, 4, 2.5, 0.25]
    for cell in ("1_0", 10**400):
        write_lines(tmp_path / "train.jsonl", json.dumps({"a": "x", "y": cell}))
        with pytest.raises(UserError, match=r"line 1: score '?1.* expected a number from 0 to 50"):
            numbers(replace(SCORES, bounds=(0.0, 50.0)), tmp_path)
