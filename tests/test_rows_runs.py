"""Distilling on rows: the same however a step is cut, continued, or its teacher stored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import save_teacher, tiny_tokenizer
from tiny_rows import Row, recipe_rows, row_recipe
from tiny_runs import assert_same_run, keys, read_weights, run_variants
from tiny_training import save_classifier, summary_of
from torch import Tensor
from torch.nn.functional import cosine_similarity, pdist, smooth_l1_loss
from transformers import AutoModel, AutoModelForSequenceClassification

from fastkd.data.rows.evaluators import OutputEvaluator
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.recipe import load_recipe

# the last compares rows of a whole step
LOSSES = {"attention": {}, "hidden": {}, "embedding_output": {}, "rkd": {}}
# of a row of three sequences at most 48
TOKENS = {"train.micro_batch_size": None, "data.batch_tokens": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "cached": {"teacher.cache": "exact"},
    "half": {"train.steps": 2},
    "recut": {"train.steps": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run on the whole, and others that should be the same."""
    folder = tmp_path_factory.mktemp("rows")
    train = {"batch_size": 16, "schedule": "constant", "checkpoint_every": 2, "micro_batch_size": 4}
    recipe = row_recipe(folder, losses=LOSSES, train=train, teacher=_stored(folder))

    def run(name: str, **values: Any) -> list[str]:
        return keys({"run.output": str(folder / name), **values})

    variants = [run(name, **values) for name, values in VARIANTS.items()]
    run_variants(recipe, [*variants, run("half"), run("recut", **TOKENS)])
    shared = [run("ranks", **TOKENS), run("zero 3", **TOKENS, **{"train.zero_stage": 3})]
    run_variants(recipe, shared, ranks=2)
    return folder


def _stored(folder: Path) -> dict[str, Any]:
    return {"model": str(save_teacher(folder / "teacher")), "cache_folder": str(folder / "states")}


@pytest.mark.parametrize("name", ["ranks", "cached", "half", "recut", "zero 3"])
def test_a_run_is_the_same_however_it_is_made(name: str, runs: Path) -> None:
    assert_same_run(runs / name, runs / "whole", losses=2e-4, weights=2e-5)
    if name == "half":
        # continued: bit for bit
        one, other = read_weights(runs / name), read_weights(runs / "whole")
        assert all(torch.equal(one[key], other[key]) for key in one)
    before, after = (summary_of(runs / run)["after"] for run in (name, "whole"))
    assert abs(before["sentence_cosine"] - after["sentence_cosine"]) < 1e-5
    assert before["rows"] == after["rows"]
    # of rows that are compared, too, which are as many in any micro-batch and on any rank
    assert before["losses"] == pytest.approx(after["losses"], rel=2e-4)


def held_out() -> list[Row]:
    """By the definition."""
    rows = recipe_rows()
    digests = [hashlib.blake2b(row["query"].encode(), digest_size=16).digest() for row in rows]
    return [
        row
        for row, digest in zip(rows, digests, strict=True)
        if int.from_bytes(digest[:8], "big") / 2**64 < 0.3
    ]


@torch.no_grad()
def test_held_out_numbers_are_those_of_texts_read_one_by_one(runs: Path) -> None:
    teacher = AutoModel.from_pretrained(runs / "teacher")
    student = AutoModel.from_pretrained(runs / "whole" / "student")
    projections = read_weights(runs / "whole")
    weight = projections["terms.3.projection.weight"]
    tokenizer, cosines = tiny_tokenizer(), []
    rows: list[tuple[int, Tensor, Tensor]] = []
    for row in held_out():
        pooled, longest = [], 0
        for column in ("query", "positive", "negative"):
            read = tokenizer(row[column], truncation=True, max_length=16, return_tensors="pt")
            read.pop("token_type_ids", None)
            theirs, own = (m(**read).last_hidden_state.mean(dim=1) for m in (teacher, student))
            cosines.append(cosine_similarity(own @ weight.T, theirs).item())
            pooled.append((own, theirs))
            longest = max(longest, read["input_ids"].shape[1])
        rows.append((longest, *(torch.cat(states) for states in zip(*pooled, strict=True))))
    after = summary_of(runs / "whole")["after"]
    assert after["rows"] == len(held_out())
    assert abs(sum(cosines) / len(cosines) - after["sentence_cosine"]) < 1e-5
    # sixteen rows of similar length at a time, as many as a step has
    rows.sort(key=lambda row: -row[0])
    groups = [rows[at : at + 16] for at in range(0, len(rows), 16)]
    assert len(groups) > 1
    values = [len(group) * _apart(*list(zip(*group, strict=True))[1:]) for group in groups]
    assert after["losses"]["rkd"] == pytest.approx(sum(values) / len(rows), rel=1e-3)


def _apart(*points: tuple[Tensor, ...]) -> float:
    """What RKD's distances of the student's and the teacher's texts come to."""
    own, theirs = (pdist(torch.cat(of_rows)) for of_rows in points)
    return float(smooth_l1_loss(own / own.mean(), theirs / theirs.mean()))


def test_a_reranker_is_compared_with_its_teacher(tmp_path: Path) -> None:
    save_classifier(tmp_path / "teacher", num_labels=1)
    data = {"columns": ["query", "passages"], "candidates": 2, "scores": "scores"}
    scored = {"kind": "margin_mse", "target": "file"}
    recipe = row_recipe(
        tmp_path,
        losses={"logits": {"kind": "mse"}, "attention": {}, "score": scored},
        student={"head": "sequence_classification"},
        data=data,
    )
    run_variants(recipe, [[]])
    after = summary_of(tmp_path / "run")["after"]
    student, teacher = _scores(tmp_path / "run" / "student"), _scores(tmp_path / "teacher")
    found = after["agreement"]
    assert after["rows"] == len(student) == len(held_out())
    assert abs(found["mean_absolute_difference"] - (student - teacher).abs().mean()) < 1e-5
    assert abs(found["spearman"] - spearmanr(student.flatten(), teacher.flatten())[0]) < 1e-6
    assert found["same_first"] == (student.argmax(1) == teacher.argmax(1)).double().mean()
    assert 0 < found["same_first"] < 1


@torch.no_grad()
def _scores(folder: Path) -> Tensor:
    """[rows, candidates], each pair read by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, scores = tiny_tokenizer(), []
    settings = {"truncation": True, "max_length": 16, "return_token_type_ids": True}
    for row in held_out():
        for passage in row["passages"]:
            read = tokenizer(row["query"], passage, return_tensors="pt", **settings)
            scores.append(model(**read).logits.item())
    return torch.tensor(scores).reshape(-1, 2)


def test_classes_of_two_models_agree_as_often_as_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator)
    evaluator = OutputEvaluator(5, 1, 3, torch.device("cpu"))
    for rows in (torch.tensor([3, 1]), torch.tensor([0, 2, 4])):
        # what a rank repeats stands behind what counts
        both = (torch.cat([one[rows], one[:1]]) for one in (student, teacher))
        evaluator.add(rows, *both)
    found = evaluator.results(Ranks(0, 1, torch.device("cpu")))
    same = (student.argmax(1) == teacher.argmax(1)).double().mean().item()
    expected = {
        "same_class": same,
        "mean_absolute_difference": (student - teacher).abs().mean().item(),
    }
    assert 0 < same < 1
    assert found == {"rows": 5, "agreement": pytest.approx(expected)}


REFUSED = {
    "blocks": (
        ["data.documents=line"],
        "columns is given, but documents is line",
    ),
    "streaming": (["data.streaming=true"], "streaming is true and documents is row"),
    "twice": (["data.columns=[query, query]"], "columns names 'query' twice"),
    "alone": (["data.columns=query", "data.candidates=2"], "candidates is 2, but columns names 1"),
    "prompt": (["data.prompts={passage: x}"], "prompts has one for 'passage', which is not read"),
    "scores": (["data.columns=query", "data.scores=good"], "scores is given, but a row is one te"),
    "number": (["data.scores=[a, b, c]"], "scores names 3 columns for 2 texts after the first"),
    "budget": (["data.batch_tokens=40"], "data.batch_tokens is 40, but a row may take 48"),
    "both": (
        ["data.batch_tokens=64", "train.micro_batch_size=2"],
        "data.batch_tokens is 64 and train.micro_batch_size 2; give one of them",
    ),
    "uncertain": (
        ["data.batch_tokens=64", "losses.balance.kind=uncertainty"],
        "losses.balance is uncertainty, which counts micro-batches",
    ),
    "unread": (["data.scores=scores"], "data.scores is given, but no loss reads scores of a file"),
    "mlm": (["student.head=masked_lm", "losses={mlm: {}, logits: {}}"], "losses.mlm masks blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_cannot_be_are_refused(case: str, tmp_path: Path) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_recipe(row_recipe(tmp_path), overrides)
