"""Tasks are read as they are published, and what is wrong in a file is said with its place."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny_rows import write_rows
from tiny_tasks import GLUE_FOLDER, PAIRS, SCORES, needs_glue, write_lines

from fastkd.data.tasks import (
    GLUE,
    Columns,
    Examples,
    Task,
    glue_task,
    read_examples,
)
from fastkd.data.text.delimited import unquoted
from fastkd.data.text.files import text_lines
from fastkd.errors import UserError

# the first lines of the official files; MNLI's dev files have four more labels before the last
HEADERS = {
    "CoLA": None,
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    "\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
    "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
ROWS = {
    "CoLA": "gj04\t0\t*\tFirst text",
    "SST-2": "First text\t0",
    "MRPC": "0\t1\t2\tFirst text\tSecond",
    "QQP": "1\t2\t3\tFirst text\tSecond\t0",
    "STS-B": "0\tg\tf\ty\t0\tn\tn\tFirst text\tSecond\t2.750",
    "MNLI": "0\t1\t1n\tg\t(\t(\t(\t(\tFirst text\tSecond\tneutral\tcontradiction",
    "QNLI": "0\tFirst text\tSecond\tnot_entailment",
    "RTE": "0\tFirst text\tSecond\tnot_entailment",
    "WNLI": "0\tFirst text\tSecond\t1",
}
LABELS = {"STS-B": 2.75, "MNLI": 2, "QNLI": 1, "RTE": 1, "WNLI": 1}
METRICS = {
    "CoLA": ("matthews",),
    "MRPC": ("f1", "accuracy"),
    "QQP": ("f1", "accuracy"),
    "STS-B": ("pearson", "spearman"),
}
SINGLE = {"CoLA", "SST-2"}
HUB = {
    "CoLA": ("cola", ["unacceptable", "acceptable"]),
    "SST-2": ("sst2", ["negative", "positive"]),
    "MRPC": ("mrpc", ["not_equivalent", "equivalent"]),
    "QQP": ("qqp", ["not_duplicate", "duplicate"]),
    "STS-B": ("stsb", None),
    "MNLI": ("mnli", ["entailment", "neutral", "contradiction"]),
    "QNLI": ("qnli", ["entailment", "not_entailment"]),
    "RTE": ("rte", ["entailment", "not_entailment"]),
    "WNLI": ("wnli", ["not_entailment", "entailment"]),
}
HUB_TEXTS = {
    "CoLA": ("sentence",),
    "SST-2": ("sentence",),
    "QQP": ("question1", "question2"),
    "MNLI": ("premise", "hypothesis"),
    "QNLI": ("question", "sentence"),
}
HUB_DEV = {"MNLI": ("validation_matched", "validation_mismatched")}


def write_split(path: Path, name: str, *rows: str) -> Path:
    header = HEADERS[name]
    return write_lines(path, *([] if header is None else [header]), *(rows or [ROWS[name]]))


def read(task: Task, source: Path, split: str = "train") -> Examples:
    return read_examples(task, source, split, source.parent / "cache")


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("ending", [".tsv", ".tsv.gz"])
def test_official_files(name: str, ending: str, tmp_path: Path) -> None:
    task = GLUE[name]
    for split in (task.train, *task.evaluations):
        write_split(tmp_path / (split + ending), name)
        examples = read(task, tmp_path, split)
        expected = ("First text",) if name in SINGLE else ("First text", "Second")
        assert list(examples) == [(expected, LABELS.get(name, 0))]
        assert examples.regression == (name == "STS-B")
        assert examples.labels.dtype == (np.float32 if name == "STS-B" else np.int64)


def test_every_task_has_its_official_metrics_and_splits() -> None:
    assert list(GLUE) == list(dict.fromkeys(GLUE)) and set(GLUE) == set(HEADERS)
    for name, task in GLUE.items():
        assert task.metrics == METRICS.get(name, ("accuracy",))
        matched = ("dev_matched", "dev_mismatched")
        assert task.evaluations == (matched if name == "MNLI" else ("dev",))
        assert task.outputs == {"STS-B": 1, "MNLI": 3}.get(name, 2)
    assert glue_task("mnli") is GLUE["MNLI"]
    assert glue_task("sst2") is glue_task("SST-2") is GLUE["SST-2"]
    with pytest.raises(UserError, match="task 'mrcp': not in GLUE; expected one of CoLA, SST-2"):
        glue_task("mrcp")


def hub_table(name: str, label: float) -> datasets.Dataset:
    names = HUB[name][1]
    texts = HUB_TEXTS.get(name, ("sentence1", "sentence2"))
    rows: dict[str, Any] = {column: [f"{column} here"] for column in texts}
    features = {column: datasets.Value("string") for column in texts}
    features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    return datasets.Dataset.from_dict(
        {**rows, "label": [label]}, features=datasets.Features(features)
    )


@pytest.mark.parametrize("name", HUB)
def test_data_sets_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = GLUE[name]
    asked = []

    def load(path: str, subset: str, *, split: str, **_: object) -> datasets.Dataset:
        asked.append((path, subset, split))
        return hub_table(name, 2.5 if task.regression else len(task.labels) - 1)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for split in (task.train, *task.evaluations):
        (example,) = read_examples(task, "nyu-mll/glue", split, tmp_path)
        texts = HUB_TEXTS.get(name, ("sentence1", "sentence2"))
        assert example.texts == tuple(f"{column} here" for column in texts)
        assert example.label == (2.5 if task.regression else len(task.labels) - 1)
    splits = ("train", *HUB_DEV.get(name, ("validation",)))
    assert asked == [("nyu-mll/glue", HUB[name][0], split) for split in splits]


@pytest.mark.parametrize("name", ["RTE", "MNLI", "STS-B"])
def test_saved_data_sets(name: str, tmp_path: Path) -> None:
    table = hub_table(name, 1)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / name))
    for source in (tmp_path, tmp_path / name):
        (example,) = read(GLUE[name], source)
        assert example.label == 1
        assert len(example.texts) == 2


def test_classes_of_a_table_are_found_by_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "a": datasets.Value("string"),
            "b": datasets.Value("string"),
            "y": datasets.ClassLabel(names=["yes", "no"]),
        }
    )
    rows = {"a": ["1", "2"], "b": ["3", "4"], "y": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "s"))
    assert read(PAIRS, tmp_path / "s").labels.tolist() == [1, 0]


def test_the_same_content_has_the_same_digest_in_every_form(tmp_path: Path) -> None:
    header, row = "index\tsentence1\tsentence2\tlabel", "0\tsentence1 here\tsentence2 here\t"
    write_lines(tmp_path / "tsv" / "train.tsv", header, row + "not_entailment")
    write_lines(tmp_path / "other" / "train.tsv", header, row + "entailment")
    cells = {"sentence1": "sentence1 here", "sentence2": "sentence2 here"}
    line = json.dumps({**cells, "label": "not_entailment", "more": 1})
    write_lines(tmp_path / "json" / "train.jsonl.gz", line)
    hub_table("RTE", 1).save_to_disk(str(tmp_path / "saved"))
    digests = [
        read(GLUE["RTE"], tmp_path / form).digest for form in ("tsv", "json", "saved", "other")
    ]
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_quotes_of_the_official_files_are_text_and_others_look_written(tmp_path: Path) -> None:
    text = '"say ""no"" now"'
    write_lines(tmp_path / "RTE" / "train.tsv", HEADERS["RTE"], f"0\t{text}\tb\tentailment")
    assert read(GLUE["RTE"], tmp_path).texts == [(text, "b")]
    write_lines(tmp_path / "train.tsv", "a\tb\ty", f"{text}\tb\tyes")
    with pytest.raises(UserError, match=r"train\.tsv, line 2: a cell looks quoted"):
        read(PAIRS, tmp_path)


@needs_glue
def test_no_official_file_looks_quoted(caplog: pytest.LogCaptureFixture) -> None:
    for path in GLUE_FOLDER.glob("*/*.tsv*"):
        lines = enumerate(text_lines(path), start=1)
        cells = ((number, line.split("\t")) for number, line in lines)
        assert sum(1 for _ in unquoted(path, cells)) > 50
    assert not caplog.records


def test_folder_of_all_tasks(tmp_path: Path) -> None:
    write_split(tmp_path / "RTE" / "train.tsv", "RTE")
    write_split(tmp_path / "WNLI" / "train.tsv", "WNLI")
    assert len(read(GLUE["RTE"], tmp_path)) == len(read(GLUE["WNLI"], tmp_path)) == 1


def test_quotes_are_characters_like_others(tmp_path: Path) -> None:
    rows = ['"unbalanced\t1', 'a "word" \'\t0', '"\t1', "line end\\n\t0"]
    write_lines(tmp_path / "train.tsv", "sentence\tlabel", *rows)
    examples = read(GLUE["SST-2"], tmp_path)
    assert [text for (text,), _ in examples] == [row.split("\t")[0] for row in rows]


def test_custom_tasks(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs" / "train.tsv", "n\ty\tb\ta", "1\tyes\tsecond\tfirst")
    assert list(read(PAIRS, tmp_path)) == [(("first", "second"), 1)]
    write_lines(tmp_path / "scores" / "train.jsonl", '{"a": "text", "y": 4}', "", '{"a":"b","y":0}')
    assert list(read(SCORES, tmp_path)) == [(("text",), 4.0), (("b",), 0.0)]
    for ending in ("csv", "parquet"):
        folder = tmp_path / ending / "scores"
        write_rows(folder / f"train.{ending}", [{"a": 'a "b",\nc', "y": 4}, {"a": "d", "y": 0}])
        assert list(read(SCORES, tmp_path / ending)) == [(('a "b",\nc',), 4.0), (("d",), 0.0)]
    assert SCORES.metrics == ("pearson", "spearman")
    assert PAIRS.metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"labels": ("a",)}, r"labels \('a',\) given, expected two different"),
        ({"labels": ("a", "b", "a")}, "hold one twice"),
        ({"labels": ()}, "expected two different ones"),
        ({"bounds": (0, 1)}, "labels and bounds given"),
        ({"labels": (), "bounds": (1, 1)}, "expected the smaller score first"),
        ({"labels": (), "bounds": (0, 1e39)}, r"scores of at most 3.403e\+38, as fp32"),
        ({"metrics": ("pearson",)}, "do not all score a classification"),
        ({"labels": (), "bounds": (0, 1), "metrics": ("pearson", "f1")}, "score a regression"),
        ({"metrics": ("recall",)}, r"metrics \['recall'\] unknown, expected some of"),
        ({"labels": ("a", "b", "c"), "metrics": ("f1",)}, "f1 scores two classes, but there are 3"),
        ({"columns": Columns(texts=("a", "b", "c"), label="y")}, "3 text columns given"),
    ],
    ids=str,
)
def test_tasks_that_make_no_sense(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"task pairs: .*{expected}"):
        replace(PAIRS, **{"metrics": (), **fields})


GOOD = "first\tsecond\tyes"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a\tc\ty", GOOD], r"line 1: no column 'b'; it has 'a', 'c', 'y', expected 'a', 'b', 'y'"),
        ([""], r"line 1: no column 'a'; it has '', expected"),
        ([], r"line 1: no column 'a'"),
        (["a\tb\ty", GOOD, "first\tsecond\tmaybe"], r"line 3: label 'maybe' of column 'y', expe"),
        (["a\tb\ty", "first\tsecond\t"], r"line 2: label '' of column 'y', expected one of no, y"),
        (["a\tb\ty", GOOD, "", GOOD], r"line 3: an empty line, expected 3 split by TAB"),
        (["a\tb\ty", "first\tyes"], r"line 2: 2 columns, expected 3 split by TAB; mend or remove"),
        (["a\tb\ty", f"{GOOD}\tmore"], r"line 2: 4 columns, expected 3"),
        (["a\tb\ty", " \tsecond\tyes"], r"line 2: a text is empty, expected words; mend or rem"),
        (["a\tb\ty"], r"pairs train has no rows; give the file that holds them"),
    ],
    ids=str,
)
def test_mistakes_in_a_file(lines: list[str], expected: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", *lines)
    with pytest.raises(UserError, match=expected) as raised:
        read(PAIRS, tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("score", ["5.001", "-0.1", "nan", "inf", "good", "", "True"])
def test_scores_out_of_range(score: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", "a\ty", "fine\t5", "text\t" + score)
    with pytest.raises(
        UserError, match=rf"line 3: score '{score}' of column 'y', expected a number from 0 to 5"
    ):
        read(SCORES, tmp_path)


def test_a_score_that_stands_for_no_label(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", "a\ty", "fine\t-99", "text\t-100")
    with pytest.raises(UserError, match=r"line 3: score '-100' of column 'y' .* on another scale"):
        read(replace(SCORES, bounds=(-200, 0)), tmp_path)


@pytest.mark.parametrize("value", [True, None, [1], "x", 6])
def test_scores_in_json(value: object, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", json.dumps({"a": "text", "y": value}))
    with pytest.raises(UserError, match=r"train.jsonl, line 1: score .* expected a number from 0"):
        read(SCORES, tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[1]", "line 1: expected a JSON object, not list"),
        ('{"a": ', "line 1: not a JSON object"),
        ('{"a": "x", "y": "no"}', "line 1: no column 'b'"),
        ('{"a": "x", "b": 5, "y": "no"}', "line 1: column 'b' holds int, expected text"),
        ('{"a": "x", "b": null, "y": "no"}', "line 1: column 'b' holds null, expected text"),
        ('{"a": "x", "b": "z", "y": 1}', "line 1: label '1' of column 'y'"),
    ],
)
def test_mistakes_in_json(row: str, expected: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", row)
    with pytest.raises(UserError, match=expected):
        read(PAIRS, tmp_path)


@pytest.mark.parametrize("prefix", [b"a\tb\ty\n", b"a\tb\ty\r\n", b"a\tb\ty\r"])
def test_bytes_that_are_not_utf8(prefix: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(prefix + b"caf\xe9\tb\tyes\n")
    with pytest.raises(UserError, match=r"train.tsv, line 2: byte \d+ is not UTF-8 \(0xe9\)"):
        read(PAIRS, tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train.tsv of pairs; it holds nothing, expected"):
        read(PAIRS, tmp_path)
    write_lines(tmp_path / "dev.tsv", "a\tb\ty", GOOD)
    with pytest.raises(UserError, match=r"no train.tsv of pairs; it holds dev.tsv, expected trai"):
        read(PAIRS, tmp_path)
    for name in ("./nothing", str(tmp_path / "nothing"), str(tmp_path / "dev.tsv")):
        with pytest.raises(UserError, match=rf"{name}: no folder .* expected one that holds"):
            read_examples(PAIRS, name, "train", tmp_path)
    with pytest.raises(UserError, match="as a hub data set it cannot be loaded"):
        read_examples(PAIRS, "nothing/here", "train", tmp_path)


def test_tables_without_labels_or_with_other_classes(tmp_path: Path) -> None:
    hub_table("RTE", -1).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(UserError, match=r"row 1: column 'label' holds -1, which stands for no"):
        read(GLUE["RTE"], tmp_path / "test")
    hub_table("MNLI", 1).rename_columns(
        {"premise": "sentence1", "hypothesis": "sentence2"}
    ).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(UserError, match="has the classes entailment, neutral, contradiction, exp"):
        read(GLUE["RTE"], tmp_path / "three")
    hub_table("SST-2", 1).save_to_disk(str(tmp_path / "single"))
    with pytest.raises(UserError, match="no column 'sentence1'; it has 'sentence', 'label'"):
        read(GLUE["RTE"], tmp_path / "single")


def test_broken_rows_of_qqp_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, short, empty = ROWS["QQP"], "1\t2\t3\tcut short", "1\t2\t3\tFirst\t \t0"
    write_split(tmp_path / "train.tsv", "QQP", *[good] * 1500, short, empty)
    with caplog.at_level(logging.WARNING):
        assert len(read(GLUE["QQP"], tmp_path)) == 1500
    assert "QQP train: 2 broken rows left out; " in caplog.text
    assert "line 1502: 4 columns, expected 6" in caplog.text
    write_split(tmp_path / "train.tsv", "QQP", good, short, empty, short)
    with pytest.raises(UserError, match="and 2 more broken rows beside 1 whole ones"):
        read(GLUE["QQP"], tmp_path)


COUNTS = {
    ("SST-2", "train"): [29780, 37569],
    ("SST-2", "dev"): [428, 444],
    ("CoLA", "train"): [2528, 6023],
    ("CoLA", "dev"): [322, 721],
    ("MRPC", "train"): [1194, 2474],
    ("MRPC", "dev"): [129, 279],
    ("RTE", "train"): [1249, 1241],
    ("RTE", "dev"): [146, 131],
    ("WNLI", "train"): [323, 312],
    ("WNLI", "dev"): [40, 31],
}


@needs_glue
@pytest.mark.parametrize(("name", "split"), COUNTS, ids=str)
def test_real_classes(name: str, split: str, tmp_path: Path) -> None:
    examples = read_examples(GLUE[name], GLUE_FOLDER, split, tmp_path)
    assert np.bincount(examples.labels).tolist() == COUNTS[name, split]
    assert all(len(texts) == (1 if name in SINGLE else 2) for texts in examples.texts)


@needs_glue
@pytest.mark.parametrize(("split", "count"), [("train", 5749), ("dev", 1500)])
def test_real_scores(split: str, count: int, tmp_path: Path) -> None:
    examples = read_examples(GLUE["STS-B"], GLUE_FOLDER, split, tmp_path)
    assert len(examples) == count
    assert (examples.labels.min(), examples.labels.max()) == (0, 5)


@needs_glue
def test_real_sample_of_mnli_as_a_custom_task(tmp_path: Path) -> None:
    task = replace(
        GLUE["MNLI"],
        columns=Columns(texts=("sentence1", "sentence2"), label="label"),
        evaluations=("dev_matched_sample1000",),
    )
    examples = read_examples(task, GLUE_FOLDER, "dev_matched_sample1000", tmp_path)
    assert Counter(examples.labels.tolist()) == {0: 373, 1: 311, 2: 316}
