"""`fastkd init`: a first recipe that fits the teacher, and can be read and run as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer import modules
from tiny_exports import save_sentences
from tiny_models import WIDTH, save_teacher, tiny_config, tiny_tokenizer, write_text
from tiny_rows import Row, random_rows, write_rows
from tiny_tasks import GLUE_FOLDER, needs_glue, write_lines
from tiny_training import save_classifier
from transformers import AutoModelForCausalLM, T5Config, T5Model

from fastkd.cli import main
from fastkd.recipe import load_recipe


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for each job, one that is none, and text."""
    folder = tmp_path_factory.mktemp("teachers")
    save_teacher(folder / "encoder")
    save_classifier(folder / "classifier", num_labels=2)
    (folder / "embedding").mkdir()
    save_sentences(folder / "embedding", modules.Pooling(WIDTH, "mean"))
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(tiny_config("llama"))
    decoder.save_pretrained(folder / "decoder")
    tiny_tokenizer().save_pretrained(folder / "decoder")
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 16}
    T5Model(T5Config(num_layers=2, **small)).save_pretrained(folder / "both")
    write_text(folder / "text.txt", documents=200)
    for split in ("train", "dev"):
        write_lines(folder / "sst" / f"{split}.tsv", "sentence\tlabel", "w5 w6\t0", "w7 w8\t1")
    return folder


def fastkd(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastkd", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


JOBS = {
    "encoder": ([], {"attention", "hidden", "embedding"}, "none"),
    "decoder": ([], {"hidden", "logits"}, "causal_lm"),
    "embedding/sentences": ([], {"embedding_output"}, "none"),
    "classifier": (
        ["--task", "sst2"],
        {"attention", "hidden", "logits"},
        "sequence_classification",
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_recipe_fits_its_teacher(
    job: str, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, losses, head = JOBS[job]
    file = tmp_path / "recipe.yaml"
    data = teachers / ("sst" if options else "text.txt")
    assert fastkd(monkeypatch, "init", teachers / job, data, *options, "--output", file) == 0
    recipe = load_recipe(file)
    assert recipe.losses.terms.keys() == losses and recipe.student.head == head
    # half of the teacher's layers, and never more tokens than it has places for
    assert recipe.student.layers == 2
    given = recipe.data.train if recipe.data else (recipe.task.source,) if recipe.task else ()
    assert given == (str(data),)
    if recipe.data is not None:
        assert recipe.data.block_size <= 64
        assert (recipe.data.documents == "row") == job.startswith("embedding")
    weights = {name: loss.weight for name, loss in recipe.losses.terms.items()}
    if job == "encoder":
        # those of recipes/demo.yaml
        assert weights == {"attention": 1, "hidden": 10, "embedding": 10}
    if options:
        # the best of the study of rates on three tasks of four (docs/glue.md)
        assert recipe.train.learning_rate == 3e-4
    # nothing that a reader would have to look up goes without a word
    assert file.read_text().count("#") >= 9


def test_it_runs_as_it_is(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fastkd(monkeypatch, "init", teachers / "encoder", teachers / "text.txt") == 0
    assert fastkd(monkeypatch, "distill", "recipe.yaml", "train.steps=11") == 0
    assert (tmp_path / "runs" / "encoder-2" / "student" / "model.safetensors").is_file()


FILES: dict[str, tuple[str, str, tuple[str | None, tuple[str, ...] | None]]] = {
    "the one": ("encoder", '{"id": 1, "body": "w5"}', ("body", None)),
    "the usual": ("decoder", '{"title": "w5 w6 w7", "text": "w5"}', ("text", None)),
    "the longest": ("encoder", '{"a b": "w5", "c": "w5 w6", "n": "0.5"}', ("c", None)),
    "one of rows": ("embedding/sentences", '{"id": 1, "body": "w5"}', ("body", None)),
    "pairs": (
        "embedding/sentences",
        '{"query": "w5", "good": "w6", "score": 1.5}',
        (None, ("query", "good")),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_columns_are_those_with_text(
    case: str, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, row, (column, columns) = FILES[case]
    rows = write_lines(tmp_path / "rows.jsonl", row)
    Dataset.from_json(str(rows), cache_dir=str(tmp_path / "c")).to_csv(str(tmp_path / "rows.csv"))
    for data in (rows, tmp_path / "rows.csv", tmp_path / "*.jsonl"):
        file = tmp_path / "recipe.yaml"
        assert fastkd(monkeypatch, "init", teachers / teacher, data, "--output", file) == 0
        read = load_recipe(file).data
        assert read is not None and read.columns == columns
        if column is not None:
            assert read.text_column == column
        file.unlink()


def _groups(count: int = 40) -> list[Row]:
    """A query, lists of two other texts and of some, and what is no text."""
    rows = random_rows(count)
    return [
        {
            "id": number,
            "genre": f"main captions {number % 2}",
            "query": f"w5 {row['positive']}",
            "passages": [f"w6 {row['negative']}", f"w7 {row['query']}"],
            "labels": ["good", "bad"],
            "day": f"{1 + number % 28}/11/2026 10:00",
        }
        for number, row in enumerate(rows)
    ]


def _with(**changes: Callable[[int], object]) -> list[Row]:
    """Those with some columns changed, by the number of the row."""
    return [
        {**row, **{name: change(number) for name, change in changes.items()}}
        for number, row in enumerate(_groups())
    ]


def _texts(number: int, count: int) -> list[str]:
    return [f"w8 w9 text {number} of {each}" for each in range(count)]


Read = tuple[tuple[str, ...] | str, int | None, tuple[str, ...]]
GROUPS: dict[str, tuple[str, list[Row], Read]] = {
    "groups": (
        "embedding/sentences",
        _groups(),
        (
            ("query", "passages"),
            2,
            (
                *("id (no text)", "genre (2 different in 40 rows)", "day (no text)"),
                "labels (2 different in 40 rows)",
            ),
        ),
    ),
    "the list before the query": (
        "embedding/sentences",
        [{"passages": row["passages"], "query": row["query"]} for row in _groups()],
        (("query", "passages"), 2, ()),
    ),
    "lists of several lengths": (
        "embedding/sentences",
        _with(passages=lambda n: _texts(n, 2 + n % 3)),
        ("query", None, ("passages (lists of 2 to 4 texts, expected as many in each)",)),
    ),
    # as of FlagEmbedding
    "two lists": (
        "embedding/sentences",
        _with(more=lambda n: _texts(n, 7)),
        (("query", "more"), 7, ("passages (lists of texts, of which one column is read)",)),
    ),
    "texts that most rows lack": (
        "embedding/sentences",
        _with(title=lambda n: None if n % 3 else f"title of w{n}"),
        (("query", "passages"), 2, ("title (no text in 26 of 40 rows)",)),
    ),
    "a query in four rows": (
        "embedding/sentences",
        _with(query=lambda n: f"w5 w{n // 4}"),
        (("query", "passages"), 2, ()),
    ),
    "one-word labels": (
        "embedding/sentences",
        _with(genre=lambda n: f"label-{n}"),
        (("query", "passages"), 2, ("genre (single words)",)),
    ),
    # between whose words there is no blank
    "Japanese": (
        "embedding/sentences",
        _with(query=lambda n: f"\u6771\u4eac\u306f\u5927\u304d\u3044{n}"),
        (("query", "passages"), 2, ()),
    ),
    "one column of blocks": (
        "encoder",
        _groups(),
        ("query", None, ("passages (lists of texts)", "genre (2 different in 40 rows)")),
    ),
    "beside a conversation": (
        "decoder",
        _with(passages=lambda n: [{"role": "user", "content": f"w{n}"}]),
        ("query", None, ("passages (conversations)",)),
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_texts_and_lists_of_them_are_told_from_labels(
    case: str, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, rows, (columns, candidates, left) = GROUPS[case]
    for data in ("rows.jsonl", "rows.parquet"):
        write_rows(tmp_path / data, rows)
        file = tmp_path / f"{data}.yaml"
        given = (teachers / teacher, tmp_path / data, "--output", file)
        assert fastkd(monkeypatch, "init", *given) == 0
        read = load_recipe(file).data
        assert read is not None and read.candidates == candidates
        assert (read.columns or read.text_column) == columns
        said = " ".join(line.strip().removeprefix("# ") for line in file.read_text().splitlines())
        assert all(name in said for name in left), said
        # nothing of the rows goes without a word
        assert all(f"{name} (" in said for name in {*rows[0]} - {*columns, columns})


def test_a_recipe_of_groups_runs_as_it_is(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "rows.jsonl", _groups(100))
    assert fastkd(monkeypatch, "init", teachers / "embedding/sentences", "rows.jsonl") == 0
    given = ("train.steps=1", "train.batch_size=4", "run.output=run")
    assert fastkd(monkeypatch, "distill", "recipe.yaml", *given) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data_rows"] < 100


@needs_glue
@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("STS-B", ("sentence1", "sentence2")),
        ("RTE", ("sentence1", "sentence2")),
        ("MRPC", ("#1 String", "#2 String")),
    ],
)
def test_pairs_of_glue_are_read_without_what_is_said_of_them(
    task: str,
    columns: tuple[str, ...],
    teachers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "recipe.yaml"
    given = (teachers / "embedding/sentences", GLUE_FOLDER / task / "train.tsv", "--output", file)
    assert fastkd(monkeypatch, "init", *given) == 0
    read = load_recipe(file).data
    assert read is not None and read.columns == columns


def test_names_of_any_writing_are_read_back(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON spells what lies beyond 16 bits as two halves, which are no YAML."""
    column = 'texte \U0001f600\x7f\u2028"'
    rows = tmp_path / "donn\u00e9es\U0001f600\u65e5.jsonl"
    write_lines(rows, json.dumps({"id": 1, column: "w5 w6"}))
    for teacher in ("encoder", "embedding/sentences"):
        file = tmp_path / f"{Path(teacher).name}.yaml"
        assert fastkd(monkeypatch, "init", teachers / teacher, rows, "--output", file) == 0
        read = load_recipe(file).data
        assert read is not None and read.train == (str(rows),) and read.text_column == column


def test_text_without_an_empty_line_is_a_document_a_line(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is one document, of which nothing can be held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [f"w{number % 7} w{number % 11} w5" for number in range(600)]
    write_lines(tmp_path / "lines.txt", *lines)
    write_lines(tmp_path / "more" / "lines.txt", *lines)
    write_lines(tmp_path / "more" / "others.txt", *lines)
    write_lines(tmp_path / "one.txt", "w5")
    for data, unit in (("lines.txt", "line"), ("more", "paragraph"), ("one.txt", "paragraph")):
        assert fastkd(monkeypatch, "init", teachers / "encoder", data, "--output", "r.yaml") == 0
        read = load_recipe("r.yaml").data
        assert read is not None and read.documents == unit
        if unit == "line":
            given = ("train.steps=1", "train.batch_size=4", "run.output=run")
            assert fastkd(monkeypatch, "distill", "r.yaml", *given) == 0
        Path("r.yaml").unlink()


UNREAD = {
    "gone": ("encoder", None, "no file or folder 'rows.jsonl'"),
    "numbers": ("encoder", '{"id": 1}', "line 1: no column holds text; it has 'id'"),
    "empty": ("embedding/sentences", "", "rows.jsonl: no rows in it; give text to learn from"),
    "only lists": (
        "embedding/sentences",
        '{"id": 1, "set": ["w5 w6", "w7"]}',
        "line 1: no column holds one text, and 'set' holds lists, which are read beside a query",
    ),
    "vectors": (
        "embedding/sentences",
        '{"id": 1, "vector": [0.5, 1]}',
        "line 1: no column holds text; it has 'id', 'vector'",
    ),
    "chat": (
        "decoder",
        '{"messages": [{"role": "user", "content": "w5"}]}',
        "line 1: column 'messages' holds a conversation",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_data_that_can_not_be_read_is_refused(
    case: str,
    teachers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, row, expected = UNREAD[case]
    if row is not None:
        write_lines(tmp_path / "rows.jsonl", row)
    assert fastkd(monkeypatch, "init", teachers / teacher, "rows.jsonl") == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_name_that_no_recipe_can_hold_is_refused(
    teachers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # as Python spells a byte that is no UTF-8
    (tmp_path / "a\udcff.txt").write_text("w5 w6")
    assert fastkd(monkeypatch, "init", teachers / "encoder", "a\udcff.txt") == 2
    assert "data: expected a path, but half a surrogate pair is no" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_task_without_a_set_is_refused(
    teachers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "sst" / "train.tsv", "sentence\tlabel", "w5 w6\t0")
    for source, expected in (("sst", "no dev.tsv of SST-2"), ("./gone", "./gone: no folder")):
        given = ("init", teachers / "classifier", source, "--task", "sst2")
        assert fastkd(monkeypatch, *given) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "options", "expected"),
    [
        ("both", [], "a t5 with no single stack of layers; fastkd distils encoders and decoders"),
        ("classifier", [], "has a head for text-classification; give --task with its task of GLUE"),
        ("classifier", ["--task", "poems"], "task 'poems': not in GLUE; expected one of CoLA"),
        ("encoder", ["--layers", "5"], "--layers 5, but the teacher has 4; give fewer"),
        ("nowhere", [], "nowhere"),
        ("encoder", ["--output", "{folder}/text.txt"], "text.txt exists already; give another"),
    ],
)
def test_what_it_can_not_begin_is_refused_in_one_line(
    teacher: str,
    options: list[str],
    expected: str,
    teachers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [option.format(folder=teachers) for option in options]
    assert fastkd(monkeypatch, "init", teachers / teacher, teachers / "text.txt", *given) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
