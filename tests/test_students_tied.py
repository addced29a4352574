"""An output layer is the embeddings in a student where it is in the model that it is made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LAYERS, VOCABULARY, WIDTH, tiny_batch, tiny_config, tiny_tokenizer
from tiny_runs import make_recipe
from transformers import PreTrainedModel

import fastkd
from benchmarks.family_models import family_model
from fastkd.distributed import joined_ranks
from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, load_student, load_teacher
from fastkd.models.importance import start_by_importance
from fastkd.models.load import auto_model
from fastkd.recipe import Student
from fastkd.types import Head, ModelSource

OUTPUT: dict[str, tuple[Head, str]] = {
    "qwen3": ("causal_lm", "lm_head.weight"),
    "bert": ("masked_lm", "cls.predictions.decoder.weight"),
}


def save_apart(folder: Path, name: str) -> Head:
    """Write a model whose configuration says tied, with an output layer of its own."""
    head, key = OUTPUT[name]
    torch.manual_seed(0)
    auto_model(head).from_config(tiny_config(name, tie_word_embeddings=True)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    assert key not in weights
    bias = {n: torch.randn_like(w) for n, w in weights.items() if n == "cls.predictions.bias"}
    save_file({**weights, **bias, key: torch.randn(VOCABULARY, WIDTH)}, file, {"format": "pt"})
    return head


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tiny_batch()).logits
    return found


@pytest.mark.parametrize("start", ["teacher", "importance"])
@pytest.mark.parametrize("name", OUTPUT)
def test_an_output_layer_that_the_configuration_denies_is_copied(
    name: str, start: str, tmp_path: Path
) -> None:
    head = save_apart(tmp_path / "teacher", name)
    teacher = load_teacher(ModelSource(str(tmp_path / "teacher")), head=head)
    layers = make_layer_map("uniform", LAYERS, LAYERS)
    student, started = build_student(teacher, Student(layers=LAYERS, head=head, init=start), layers)
    copied = started.copied
    if start == "importance":
        with joined_ranks() as ranks:
            copied = start_by_importance(student, teacher, layers, [], ranks)
    assert copied == started.total
    assert logits(student).equal(logits(teacher))
    student.save_pretrained(tmp_path / "student")
    assert logits(load_student(tmp_path / "student", head=head)).equal(logits(teacher))


def test_a_run_exports_an_output_layer_that_the_configuration_denies(tmp_path: Path) -> None:
    head = save_apart(tmp_path / "own", "bert")
    recipe = make_recipe(
        tmp_path,
        teacher={"model": str(tmp_path / "own")},
        student={"layers": LAYERS, "head": head, "hidden_size": None, "intermediate_size": None},
        losses={"attention": None, "hidden": None, "embedding": None, "logits": {}},
        train={"steps": 3},
    )
    result = fastkd.distill(recipe, quiet=True)
    assert float(result.summary["before"]["losses"]["logits"]) < 1e-6
    again = load_student(result.folder / "student", head=head)
    assert not again.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_a_start_keeps_its_own_output_layer(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = {}
    for name, depth, own in (("teacher", LAYERS, not tied), ("start", 2, tied)):
        config = tiny_config("qwen3", num_hidden_layers=depth, tie_word_embeddings=own)
        config.max_window_layers = LAYERS
        made[name] = auto_model("causal_lm").from_config(config)
        made[name].save_pretrained(tmp_path / name)
    teacher = load_teacher(ModelSource(str(tmp_path / "teacher")), head="causal_lm")
    section = Student(layers=2, head="causal_lm", init=str(tmp_path / "start"))
    student, started = build_student(teacher, section, make_layer_map("uniform", 2, LAYERS))
    assert student.config.tie_word_embeddings == tied
    assert started.copied == started.total
    assert logits(student).equal(logits(made["start"]))


@pytest.mark.parametrize(("family", "head"), [("luke", "masked_lm"), ("cpmant", "causal_lm")])
def test_what_is_tied_in_another_way_stays_tied(family: str, head: Head, tmp_path: Path) -> None:
    family_model(family, head).save_pretrained(tmp_path)
    assert load_teacher(ModelSource(str(tmp_path)), head=head).config.tie_word_embeddings
