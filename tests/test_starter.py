"""`fastkd init`: a first recipe that fits the teacher, and can be read and run as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer import modules
from tiny_exports import save_sentences
from tiny_models import WIDTH, save_teacher, tiny_config, tiny_tokenizer, write_text
from tiny_tasks import write_lines
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
def test_columns_are_those_of_the_first_row(
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
