"""`fastkd init`: a first recipe that fits the teacher, and can be read and run as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer import modules
from tiny_exports import save_sentences
from tiny_models import WIDTH, save_teacher, tiny_config, tiny_tokenizer, write_text
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
    data = teachers / "text.txt"
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
    assert file.read_text().count("#") >= 6


def test_it_runs_as_it_is(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fastkd(monkeypatch, "init", teachers / "encoder", teachers / "text.txt") == 0
    assert fastkd(monkeypatch, "distill", "recipe.yaml", "train.steps=11") == 0
    assert (tmp_path / "runs" / "encoder-2" / "student" / "model.safetensors").is_file()


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
