"""The tokenizer that a student is handed on with: whose it is, and that it reads as it was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from test_other_models import recipe_of
from tiny_exports import save_sentences
from tiny_models import POSITIONS, VOCABULARY, WIDTH, save_teacher, tiny_config, tiny_tokenizer
from tiny_rows import row_recipe
from tiny_runs import make_recipe
from tokenizers import normalizers
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer

import fastkd
from fastkd.errors import UserError
from fastkd.models.vocabulary import check_saved, read_tokenizer
from fastkd.types import ModelSource

READING = "sentence_bert_config.json"
LOUD = ["W7 w9 W20", "w11 W12"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} w7{% endfor %}"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def cased_tokenizer() -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{number}" for number in range(5, VOCABULARY))]
    table = {word: number for number, word in enumerate(words)}
    return BertTokenizer(vocab=table, do_lower_case=False)


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A teacher whose tokenizer makes its normalizer itself and that reads lower case."""
    torch.manual_seed(0)
    teacher = save_sentences(tmp_path / "made", models.Pooling(WIDTH, "mean"))
    cased_tokenizer().save_pretrained(teacher)
    change(teacher / READING, do_lower_case=True)
    return teacher


def test_lower_case_stays_whoever_loads_the_student(tmp_path: Path, lower: Path) -> None:
    library = SentenceTransformer(str(lower), device="cpu").tokenizer
    expected = library(LOUD).input_ids
    assert cased_tokenizer()(LOUD).input_ids != expected
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}}]
    recipe = row_recipe(tmp_path, teacher={"model": str(lower)}, losses={"embedding_output": {}})
    found = fastkd.distill(recipe, {"stages": stages}, quiet=True)
    student = found.folder / "student"
    for tokenizer in (AutoTokenizer.from_pretrained(student), found.tokenizer):
        assert tokenizer(LOUD).input_ids == expected
        assert tokenizer.model_input_names == library.model_input_names
    assert SentenceTransformer(str(student), device="cpu").tokenizer(LOUD).input_ids == expected
    assert read_tokenizer(ModelSource(str(student)))(LOUD).input_ids == expected
    # the second stage begins where the first one ended
    first, second = found.summary["stages"]
    ended, began = first["after"]["sentence_cosine"], second["before"]["sentence_cosine"]
    assert began == pytest.approx(ended, abs=1e-5)


def test_a_tokenizer_that_is_another_one_once_it_is_saved_is_refused(tmp_path: Path) -> None:
    tokenizer = cased_tokenizer()
    config = tiny_config("bert")
    check_saved(tokenizer, config, "model here")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="model here: whoever loads the student would read") as said:
        check_saved(tokenizer, config, "model here")
    assert "as it was read once its tokenizer (BertTokenizer) is saved" in str(said.value)


def test_lower_case_without_a_place_for_it_is_refused(
    lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BertTokenizer, "backend_tokenizer", None)
    with pytest.raises(UserError, match=r"say do_lower_case, but its tokenizer \(BertTokenizer\)"):
        read_tokenizer(ModelSource(str(lower)))


def test_a_student_of_fewer_positions_is_cut_where_they_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = save_sentences(
        tmp_path / "made",
        models.Pooling(WIDTH, "cls"),
        architecture="roberta",
        max_position_embeddings=4 * POSITIONS,
    )
    change(teacher / "tokenizer_config.json", model_max_length=3 * POSITIONS)
    # it counts positions from the second on, and its tokenizer says nothing
    start = save_teacher(tmp_path / "start", "roberta", seed=1, num_hidden_layers=2)
    table = json.loads((start / "config.json").read_text())["max_position_embeddings"]
    recipe = recipe_of(
        tmp_path, start, teacher={"model": str(teacher)}, losses={"embedding_output": {}}
    )
    student = fastkd.distill(recipe, {"train.steps": 1}, quiet=True).folder / "student"
    found = SentenceTransformer(str(student), device="cpu")
    assert (
        found.max_seq_length == table - 1 == AutoTokenizer.from_pretrained(student).model_max_length
    )
    assert found.encode(["w7 " * 2 * POSITIONS]).shape == (1, WIDTH)
    # nor are they trained on longer ones
    longer = {"data.block_size": table, "run.output": str(tmp_path / "longer")}
    with pytest.raises(UserError, match=f"has {table - 1} positions, but data.block_size is"):
        fastkd.distill(recipe, longer, quiet=True)


def start_of(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config("llama", **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoken(folder: Path, ends: Any, eos: str, template: str | None, **changes: Any) -> Path:
    """A decoder that ends its texts at some tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    start_of(folder, tokenizer, **changes)
    change(folder / "generation_config.json", eos_token_id=ends)
    return folder


def causal(folder: Path, teacher: Path, start: Path) -> fastkd.Result:
    numbers = {"layers": None, "hidden_size": None, "intermediate_size": None}
    recipe = make_recipe(
        folder,
        teacher={"model": str(teacher)},
        student={**numbers, "head": "causal_lm", "init": str(start)},
        losses={"attention": None, "hidden": None, "embedding": None, "logits": {}},
        train={"steps": 1, "warmup_steps": 0},
    )
    return fastkd.distill(recipe, quiet=True)


def test_a_chat_ends_where_teacher_and_start_end_it(tmp_path: Path) -> None:
    chat = spoken(tmp_path / "chat", [7, 9], "w7", TEMPLATE)
    base = spoken(tmp_path / "base", 3, "[SEP]", None, num_hidden_layers=2)
    found = causal(tmp_path / "one", chat, base)
    assert found.tokenizer.chat_template == TEMPLATE and found.tokenizer.eos_token == "[SEP]"
    assert found.student.generation_config.eos_token_id == [3, 7, 9]
    notes = " ".join(found.summary["notes"])
    assert "has no chat template, so the student is given the teacher's" in notes
    assert "its generation ends at the teacher's w7, w9 as well" in notes
    # and the other way around all of it is the start's
    chat = spoken(tmp_path / "small", [7, 3], "w7", TEMPLATE, num_hidden_layers=2)
    found = causal(tmp_path / "two", spoken(tmp_path / "large", 3, "[SEP]", None), chat)
    assert found.tokenizer.chat_template == TEMPLATE and found.tokenizer.eos_token == "w7"
    assert found.student.generation_config.eos_token_id == [7, 3]
    assert not any("student.init" in note for note in found.summary["notes"])


def test_a_limit_of_the_start_is_kept_and_its_frame_is_not_where_it_was_not_trained(
    tmp_path: Path,
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    start = save_teacher(tmp_path / "start", seed=1, num_hidden_layers=2)
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = ByteLevel()
    for name, tokenizer in (("framed", tiny_tokenizer()), ("bare", bare)):
        tokenizer.model_max_length = 20
        tokenizer.save_pretrained(start)
        recipe = recipe_of(
            tmp_path, start, teacher={"model": str(teacher)}, losses={"embedding_output": {}}
        )
        output = str(tmp_path / name)
        found = fastkd.distill(recipe, {"train.steps": 1, "run.output": output}, quiet=True)
        assert found.tokenizer.model_max_length == 20
        assert found.tokenizer("w7").input_ids == tiny_tokenizer()("w7").input_ids
        said = any("puts other tokens around a text" in note for note in found.summary["notes"])
        assert said == (name == "bare")
