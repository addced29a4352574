"""What a model card says of loading: it runs, and gives what the student was trained to give."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tiny_cards import tiny_summary
from tiny_exports import exported
from tiny_models import save_teacher, tiny_config, tiny_tokenizer
from tiny_rows import row_recipe
from tiny_training import save_classifier
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import fastkd
from fastkd.recipe import load_recipe
from fastkd.training.card.card import make_card
from fastkd.training.run_folder import RunFolder


def code_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The code of a card and what the hub reads of it."""
    card = ModelCard.load(folder / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return code, card.data.to_dict()


def run(code: str, folder: Path) -> str:
    """What the code prints, with texts that the tiny tokenizer knows."""
    words = code.replace("MODEL", str(folder)).replace("a text", "w7 w8").replace("another", "w20")
    with redirect_stdout(StringIO()) as printed:
        exec(words, {})
    return printed.getvalue()


def test_a_sparse_encoder_is_loaded_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = save_teacher(tmp_path / "plain")
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(plain)
    SparseEncoder(str(plain), device="cpu").save_pretrained(str(tmp_path / "sparse"))
    folder = exported(tmp_path / "run", tmp_path / "sparse", "masked_lm")
    code, said = code_of(folder)
    assert "SparseEncoder(" in code and said["pipeline_tag"] == "feature-extraction"
    assert "sparse" in run(code, folder)


def test_a_reranker_of_logits_is_loaded_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    first = Transformer(str(tmp_path / "plain"), transformer_task="text-generation")
    whole = CrossEncoder(modules=[first, LogitScore(9, 10)], device="cpu")
    whole.save_pretrained(str(tmp_path / "teacher"))
    folder = exported(tmp_path / "run", tmp_path / "teacher", "causal_lm")
    code, said = code_of(folder)
    assert "CrossEncoder(" in code and said["pipeline_tag"] == "text-ranking"
    # its score is that of the two tokens behind the pair
    assert CrossEncoder(str(folder), device="cpu")[1].true_token_id == 9
    assert run(code, folder).startswith("[")


@pytest.mark.parametrize("modules", [False, True])
def test_a_reranker_is_asked_with_its_prompts(tmp_path: Path, modules: bool) -> None:
    teacher = save_classifier(tmp_path / "plain", num_labels=1)
    if modules:
        CrossEncoder(str(teacher), device="cpu").save_pretrained(str(tmp_path / "modules"))
        teacher = tmp_path / "modules"
    recipe = row_recipe(
        tmp_path,
        teacher={"model": str(teacher)},
        student={"layers": 2, "hidden_size": None, "head": "sequence_classification"},
        losses={"score": {"kind": "listwise_kl"}},
        data={
            "columns": ["query", "passages"],
            "candidates": 2,
            "block_size": 40,
            "prompts": {"query": "w9 w9 ", "passages": "w30 "},
        },
    )
    found = fastkd.distill(recipe, {"train.steps": 1}, quiet=True)
    folder = found.folder / "student"
    code, said = code_of(folder)
    assert said["library_name"] == "sentence-transformers"
    assert said["pipeline_tag"] == "text-ranking"
    assert "Labels, in order" not in (folder / "README.md").read_text()
    expected = CrossEncoder(str(folder), device="cpu").predict([("w9 w9 w7 w8", "w30 w20")])
    assert run(code, folder).strip() == str(expected)
    assert any("trained with query 'w9 w9 ', passages 'w30 '" in n for n in found.summary["notes"])


def test_the_step_that_was_exported_is_named(tmp_path: Path) -> None:
    recipe = row_recipe(tmp_path)
    found = fastkd.distill(recipe, {"train.steps": 1}, quiet=True)
    kept = {"kept_best": {"metric": "total", "value": 0.5}, "exported_step": 3}
    texts = [
        str(make_card(RunFolder(found.folder), load_recipe(recipe), tiny_summary(**changes), {}))
        for changes in ({}, kept)
    ]
    line = "- exported: the student of step 3, whose total is the best (0.5)"
    assert [line in text for text in texts] == [False, True]
