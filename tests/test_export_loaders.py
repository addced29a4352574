"""A student of every head is read by the loaders that its users know, as it was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder
from tiny_exports import exported
from tiny_models import tiny_config, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from fastkd.head_spec import HEADS
from fastkd.types import Head

LABELS = ["bad", "good", "neither"]
TEXT = "w7 w8 [MASK] w9"


def student_of(folder: Path, head: Head) -> Path:
    """The exported student of a tiny teacher with a head."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    config = tiny_config("gpt2" if head == "causal_lm" else "bert", **names)
    auto = getattr(transformers, HEADS[head].auto_model)
    auto.from_config(config).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    return exported(folder / "run", folder / "teacher", head)


def check_features(pipe: Any, model: PreTrainedModel, encoded: Any) -> None:
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe(TEXT)), states, atol=1e-5, rtol=0)


def check_classes(pipe: Any, model: PreTrainedModel, encoded: Any) -> None:
    with torch.no_grad():
        chances = model(**encoded).logits[0].softmax(dim=-1)
    found = {answer["label"]: answer["score"] for answer in pipe(TEXT, top_k=None)}
    assert found == pytest.approx(dict(zip(LABELS, chances.tolist(), strict=True)), abs=1e-5)


def check_masked_words(pipe: Any, model: PreTrainedModel, encoded: Any) -> None:
    with torch.no_grad():
        words = model(**encoded).logits[encoded["input_ids"] == 4][0]
    assert pipe(TEXT)[0]["token"] == int(words.argmax())


def check_next_words(pipe: Any, model: PreTrainedModel, encoded: Any) -> None:
    with torch.no_grad():
        word = model(**encoded).logits[0, -1].argmax()
    (made,) = pipe(TEXT, max_new_tokens=1, do_sample=False, return_tensors=True)
    assert made["generated_token_ids"] == [*encoded["input_ids"][0].tolist(), int(word)]


def check_words(pipe: Any, model: PreTrainedModel, encoded: Any) -> None:
    with torch.no_grad():
        numbers = model(**encoded).logits[0, 1:-1].argmax(dim=-1).tolist()
    assert [found["entity"] for found in pipe(TEXT)] == [LABELS[number] for number in numbers]


CHECKS = {
    "feature-extraction": check_features,
    "text-classification": check_classes,
    "fill-mask": check_masked_words,
    "text-generation": check_next_words,
    "token-classification": check_words,
}


@pytest.mark.parametrize("head", [head for head, spec in HEADS.items() if spec.has_pipeline])
def test_its_class_and_its_pipeline_read_it(tmp_path: Path, head: Head) -> None:
    folder, spec = student_of(tmp_path, head), HEADS[head]
    auto = getattr(transformers, spec.auto_model)
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert [model.config.id2label[n] for n in range(3)] == LABELS
    assert model.config.label2id == {name: number for number, name in enumerate(LABELS)}
    encoded = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    pipe = pipeline(spec.hub_task, str(folder), device="cpu")
    CHECKS[spec.hub_task](pipe, model.eval(), encoded)


def test_a_classifier_of_pairs_is_a_cross_encoder(tmp_path: Path) -> None:
    folder = student_of(tmp_path, "sequence_classification")
    model = CrossEncoder(str(folder), device="cpu")
    found = model.predict([("w7 w8", "w9")], apply_softmax=True)
    assert found.shape == (1, 3) and float(found.sum()) == pytest.approx(1)
    assert model.config.id2label == dict(enumerate(LABELS))
    # it reads pairs as they were trained on, though the teacher's tokenizer didn't hand types on
    read = tiny_tokenizer()("w7 w8", "w9", return_token_type_ids=True, return_tensors="pt")
    assert read["token_type_ids"].any()
    with torch.no_grad():
        expected = model.model(**read).logits
    logits = model.predict([("w7 w8", "w9")], activation_fn=torch.nn.Identity())
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-6, rtol=0)
