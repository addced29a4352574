"""What a run exports loads where its users expect it to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_models import write_text
from tiny_runs import run_variants
from transformers import AutoModel, AutoTokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps from the packaged MiniLM: a student as wide as its teacher, and a narrow one."""
    folder = tmp_path_factory.mktemp("export")
    corpus = write_text(folder / "corpus.txt")
    found = {name: folder / name for name in ("wide", "narrow")}
    common = [
        f"data.train={corpus}",
        f"data.cache={folder / 'cache'}",
        "data.block_size=16",
        "data.heldout_blocks=4",
        "data.workers=1",
        "data.heldout_fraction=0.3",
        "train.steps=2",
        "train.batch_size=2",
        "train.warmup_steps=0",
    ]
    narrow = ["student.hidden_size=48", "student.intermediate_size=64"]
    variants = [
        [*common, f"run.output={found['wide']}"],
        [*common, *narrow, f"run.output={found['narrow']}"],
    ]
    run_variants(RECIPE, variants)
    return found


@pytest.mark.parametrize(("name", "width"), [("wide", 384), ("narrow", 48)])
def test_auto_model_and_sentence_transformers_load_it(
    runs: dict[str, Path], name: str, width: int
) -> None:
    folder = runs[name] / "student"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3
    assert model.config.hidden_size == width
    # trained without dropout, but handed on with the teacher's rates
    assert model.config.hidden_dropout_prob == 0.1
    sentences = ["a small model", "learns from a large one, and says much the same"]
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    if name == "narrow":
        # what ties its last layer to the teacher's also takes its embeddings there
        projections = load_file(runs["narrow"] / "projections.safetensors")
        weight, bias = (projections[f"terms.1.{kind}_0"] for kind in ("weight", "bias"))
        means = torch.nn.functional.linear(means, weight, bias)
    means = torch.nn.functional.normalize(means, dim=-1)
    embeddings = SentenceTransformer(str(folder), device="cpu").encode(
        sentences, convert_to_tensor=True
    )
    torch.testing.assert_close(embeddings, means, atol=1e-5, rtol=0)


def test_projections_stay_out_of_the_student(runs: dict[str, Path]) -> None:
    student = load_file(runs["narrow"] / "student" / "model.safetensors")
    assert not any("weight_0" in name for name in student)
    projections = load_file(runs["narrow"] / "projections.safetensors")
    assert projections["terms.1.weight_0"].shape == (384, 48)
    assert load_file(runs["wide"] / "projections.safetensors") == {}
