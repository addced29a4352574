"""Students that are other models than their teachers: architecture, vocabulary, pooling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, models
from test_recipe import refusal as recipe_refusal
from test_recipe import tree
from tiny_models import save_teacher, tiny_config, tiny_model, tiny_tokenizer
from tiny_others import letter_tokenizer, save_other
from tiny_rows import random_rows, row_recipe, write_rows
from tiny_runs import assert_same_run, make_recipe, run_variants
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd import distill, evaluate
from fastkd.capture import sees_ahead
from fastkd.data.batching import plan_batches
from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.models import own_model, vocabulary_difference
from fastkd.recipe import Recipe, Student, load_recipe
from fastkd.training.gather import gather
from fastkd.training.judging import RunEncoder, judge_embeddings
from fastkd.training.parts import Parts
from fastkd.training.setup import set_up
from fastkd.types import TEACHER, Head

LOSSES = {"embedding_output": {}, "rkd": {}, "similarity": {}}


def recipe_of(folder: Path, start: Path, **sections: Any) -> Path:
    """A recipe of rows whose student starts from another model."""
    given = {"losses": LOSSES, **sections}
    data = given.pop("data", {})
    train = write_rows(folder / "short.jsonl", random_rows(50, longest=7))
    return row_recipe(
        folder,
        student={"layers": None, "hidden_size": None, "intermediate_size": None, "init": str(start)}
        | given.pop("student", {}),
        data={"train": str(train), "columns": ["query"], "block_size": 24, **data},
        **given,
    )


@pytest.fixture
def ranks() -> Any:
    yield start_ranks()
    stop_ranks()


def parts_of(path: Path, ranks: Ranks) -> Parts:
    recipe = load_recipe(path)
    return gather(recipe, plan_batches(recipe, 1), ranks, progress=False)


@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_a_student_of_another_vocabulary_learns_the_teachers_embeddings(
    tmp_path: Path, name: str
) -> None:
    start = save_other(tmp_path / "other", name)
    train = {"steps": 30, "learning_rate": 4e-3, "log_every": 30}
    done = distill(str(recipe_of(tmp_path, start, train=train)), quiet=True)
    before, after = (done.summary[when]["sentence_cosine"] for when in ("before", "after"))
    assert before < 0.3 and after > 0.8
    again = evaluate(str(done.folder), quiet=True)
    assert again.judged["sentence_cosine"] == pytest.approx(after, abs=1e-6)
    assert "\nA student, distilled from" in (done.folder / "student" / "README.md").read_text()
    # its folder is a whole model, of its own tokenizer and in the teacher's space
    student, teacher = done.folder / "student", tmp_path / "teacher"
    assert vocabulary_difference(AutoTokenizer.from_pretrained(student), letter_tokenizer()) is None
    texts = [row["query"] for row in random_rows(50, longest=7)]
    found, expected = (
        SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
        for folder in (student, teacher)
    )
    assert torch.cosine_similarity(found, expected).mean() > 0.8


def test_ranks_micro_batches_and_a_cache_change_nothing(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, save_other(tmp_path / "other"), data={"columns": ["query", "positive"]}
    )
    one, two, cached = (tmp_path / name for name in ("one", "two", "cached"))
    cache = ["teacher.cache=exact", f"teacher.cache_folder={tmp_path / 'states'}"]
    run_variants(recipe, [[f"run.output={one}"], [f"run.output={cached}", *cache]])
    run_variants(recipe, [[f"run.output={two}", "train.micro_batch_size=2"]], ranks=2)
    assert_same_run(two, one, losses=1e-5, weights=2e-5)
    # states of tokens are the teacher's tokens'
    assert_same_run(cached, one, losses=1e-5, weights=2e-5)


def test_each_model_reads_its_own_tokens(tmp_path: Path, ranks: Ranks) -> None:
    recipe = recipe_of(tmp_path, save_other(tmp_path / "other", "llama"))
    run = set_up(load_recipe(recipe), ranks, progress=False)
    (batch,) = run.micro_batches().next_step(0)
    theirs = batch[f"{TEACHER}input_ids"]
    assert batch["input_ids"].shape[0] == theirs.shape[0] == 8
    # letters are more than words
    assert batch["attention_mask"].sum() > batch[f"{TEACHER}attention_mask"].sum()
    embedding = run.teacher(batch).embedding  # type: ignore[union-attr]
    plain = tiny_model("bert")
    for place, ids in enumerate(theirs):
        valid = batch[f"{TEACHER}attention_mask"][place].bool()
        with torch.no_grad():
            states = plain(input_ids=ids[valid][None]).last_hidden_state
        torch.testing.assert_close(embedding[place], states[0].mean(dim=0), atol=1e-5, rtol=1e-5)


def test_embeddings_are_judged_by_each_models_own_tokens(tmp_path: Path, ranks: Ranks) -> None:
    rows = random_rows(20, longest=5)
    place = str(write_rows(tmp_path / "pairs.jsonl", rows))
    columns = {"sentence1": "query", "sentence2": "positive", "score": "good"}
    evaluated = {"pairs": {"sts": {"path": place, **columns}}}
    recipe = recipe_of(tmp_path, save_other(tmp_path / "other"), evaluate=evaluated)
    run = set_up(load_recipe(recipe), ranks, progress=False)
    teacher = SentenceTransformer(str(tmp_path / "teacher"), device="cpu")
    one, other = (
        torch.from_numpy(teacher.encode([row[name] for row in rows]))
        for name in ("query", "positive")
    )
    expected = spearmanr(torch.cosine_similarity(one, other), [row["good"] for row in rows])[0]
    assert judge_embeddings(run, "teacher")["pairs"]["sts"] == pytest.approx(expected, abs=1e-6)
    found = RunEncoder(run, "teacher").embed([row["query"] for row in rows])
    torch.testing.assert_close(torch.from_numpy(found), one, atol=1e-5, rtol=1e-5)
    assert RunEncoder(run, "student").embed(["w12 w5"]).shape == (1, 32)


def save_pooling(folder: Path, pooling: str, *, name: str = "bert", other: bool = False) -> Path:
    """A model whose own modules say how it pools."""
    plain = save_other(folder / "plain", name) if other else save_teacher(folder / "plain", name)
    transformer = models.Transformer(str(plain))
    pool = models.Pooling(transformer.get_word_embedding_dimension(), pooling)
    modules = [transformer, pool, models.Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "whole"))
    return folder / "whole"


def of_decoder(folder: Path) -> Path:
    return save_other(folder / "other", "llama")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (lambda folder: save_other(folder / "other"), "cls"),
        (lambda folder: save_other(folder / "other", "llama"), "mean"),
        (lambda folder: save_pooling(folder / "x", "lasttoken", name="llama", other=True), "last"),
    ],
    ids=["as the teacher", "a decoder", "its own"],
)
def test_another_model_pools_as_it_can(
    tmp_path: Path, ranks: Ranks, start: Callable[[Path], Path], expected: str
) -> None:
    teacher = {"model": str(save_pooling(tmp_path / "t", "cls"))}
    parts = parts_of(recipe_of(tmp_path, start(tmp_path), teacher=teacher), ranks)
    student, theirs = (parts.objective.embedding(side) for side in ("student", "teacher"))
    assert student is not None and theirs is not None
    assert (student.pooling, theirs.pooling) == ((expected,), ("cls",))
    assert [type(step).__name__ for step in student.given()] == ["Normalize"]
    assert student.dim == theirs.dim == 32


def test_the_pooling_of_another_model_is_exported(tmp_path: Path) -> None:
    teacher = {"model": str(save_pooling(tmp_path / "t", "cls"))}
    recipe = recipe_of(tmp_path, of_decoder(tmp_path), teacher=teacher, train={"steps": 2})
    folder = distill(str(recipe), quiet=True).folder / "student"
    kinds = [
        module["type"].rsplit(".")[-1]
        for module in json.loads((folder / "modules.json").read_text())
    ]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert settings["word_embedding_dimension"] == 24
    assert settings["pooling_mode_mean_tokens"] and not settings["pooling_mode_cls_token"]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_whether_tokens_see_ahead(name: str) -> None:
    assert sees_ahead(tiny_model(name)) == (name == "bert")


def test_a_reranker_of_another_vocabulary_learns_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_model("bert").config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = recipe_of(
        tmp_path,
        save_other(tmp_path / "other", "llama", scores=True),
        student={"head": "sequence_classification"},
        data={"columns": ["query", "positive", "negative"], "block_size": 40},
        losses={"logits": {"kind": "mse"}},
        train={"steps": 12, "learning_rate": 4e-3, "log_every": 12},
    )
    done = distill(str(recipe), quiet=True)
    (loss,) = done.losses_after.values()
    assert loss < 0.7 * next(iter(done.losses_before.values()))
    config = json.loads((done.folder / "student" / "config.json").read_text())
    assert (config["model_type"], config["pad_token_id"]) == ("llama", 1)


IDENTITY = {"activation_fn": "torch.nn.modules.linear.Identity"}


@pytest.mark.parametrize("head", ["sequence_classification", "none"])
@pytest.mark.parametrize("theirs", [IDENTITY, None])
def test_a_score_means_what_the_teachers_means(
    theirs: dict[str, str] | None, head: Head, tmp_path: Path
) -> None:
    start = save_other(tmp_path, scores=True)
    own = json.loads((tmp_path / "config.json").read_text())
    own["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "config.json").write_text(json.dumps(own))
    teacher = tiny_config("bert", num_labels=1)
    if theirs is not None:
        teacher.sentence_transformers = theirs
    found = own_model(Student(init=str(start), head=head), teacher)
    assert found is not None
    expected = theirs if head != "none" else own["sentence_transformers"]
    assert getattr(found.config, "sentence_transformers", None) == expected


def test_a_model_of_another_architecture_and_the_same_words_is_compared_inside(
    tmp_path: Path, ranks: Ranks
) -> None:
    start = save_teacher(tmp_path / "start", "distilbert", num_hidden_layers=2, hidden_size=24)
    student = {"init": str(start), "layers": 2, "hidden_size": 24, "intermediate_size": None}
    parts = parts_of(make_recipe(tmp_path, student=student), ranks)
    assert {"attention/1-2", "hidden/2-4"} <= set(parts.objective.labels)
    assert parts.handed_on["attention_dropout"] == 0.1
    assert not hasattr(parts.module.student.config, "hidden_dropout_prob")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "inside": (
        {"losses": {"embedding_output": {}, "hidden": {}}},
        r"id 0 is '\[UNK\]' there .* losses.hidden compares token by token, so leave it out",
    ),
    "blocks": (
        {"data": {"documents": "line", "columns": None}},
        "set data.documents to row, where each model reads by its own tokenizer",
    ),
    "another depth": ({"student": {"layers": 3}}, "has num_hidden_layers 2, but student.layers is"),
    "another width": ({"student": {"hidden_size": 32}}, "has hidden_size 24, but student.hidden"),
    "another inner width": (
        {"student": {"intermediate_size": 7}},
        "has hidden_dim 48, but student.intermediate_size is 7; leave student.intermediate_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_vocabularies_can_not_do_is_refused(
    tmp_path: Path, ranks: Ranks, case: str
) -> None:
    sections, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        parts_of(recipe_of(tmp_path, save_other(tmp_path / "other"), **sections), ranks)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_must_have_the_teachers_tokens(
    tmp_path: Path, ranks: Ranks
) -> None:
    start = save_other(tmp_path / "other")
    for path in start.glob("token*"):
        path.unlink()
    with pytest.raises(
        UserError, match="embeds 16 tokens, but the teacher's tokenizer gives 'w63'"
    ):
        parts_of(recipe_of(tmp_path, start), ranks)


def test_layers_may_be_left_out_of_a_model_to_start_from_alone(tmp_path: Path) -> None:
    given = tree()
    given["student"] = {"init": "random"}
    assert recipe_refusal(given).startswith("student.layers: missing; ")
    given["student"] = {"init": "somewhere"}
    assert Recipe.model_validate(given).student.layers is None
    start = str(save_teacher(tmp_path / "start", num_hidden_layers=2))
    teacher = tiny_model("bert").config
    assert own_model(Student(init=start, layers=2), teacher) is None
    assert own_model(Student(init=start), teacher).config.num_hidden_layers == 2  # type: ignore[union-attr]
