"""What sentence-transformers reads texts by and compares embeddings by, of teacher and student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from test_other_models import recipe_of as other_recipe
from tiny_exports import save_sentences
from tiny_models import POSITIONS, WIDTH, save_teacher, tiny_config, tiny_tokenizer
from tiny_others import save_other
from tiny_rows import row_recipe, write_rows
from tiny_runs import make_recipe
from transformers import AutoModelForCausalLM

import fastkd
from fastkd.distributed import start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.models.sentence_folder import is_unsure
from fastkd.models.vocabulary import read_tokenizer
from fastkd.recipe import load_recipe
from fastkd.training.embeddings import find_default_prompt
from fastkd.training.judging import RunEncoder
from fastkd.training.setup import Run, set_up
from fastkd.types import ModelSource

READING = "sentence_bert_config.json"
LIBRARY = "config_sentence_transformers.json"
LOUD = ["W7 w9 W20", "w11 W12"]


def change(folder: Path, name: str, **settings: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def encoder(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / READING).read_text())
    return found


def trained(recipe: Path, folder: Path, **changes: Any) -> Path:
    given = {"train.steps": 1, "run.output": str(folder), **changes}
    return fastkd.distill(recipe, given, quiet=True).folder / "student"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_sentences(tmp_path / "made", models.Pooling(WIDTH, "mean"))


def test_text_is_lower_case_where_the_library_makes_it_so(tmp_path: Path, teacher: Path) -> None:
    source = ModelSource(str(teacher))
    loud, quiet = (read_tokenizer(source) for _ in range(2))
    assert loud is not None and quiet is not None
    change(teacher, READING, do_lower_case=True)
    quiet = read_tokenizer(source)
    assert quiet is not None and loud(LOUD).input_ids != quiet(LOUD).input_ids
    assert quiet(LOUD).input_ids == encoder(teacher).tokenizer(LOUD).input_ids
    recipe = row_recipe(tmp_path, teacher={"model": str(teacher)}, losses={"embedding_output": {}})
    student = trained(recipe, tmp_path / "run")
    found = encoder(student)
    assert (found.encode(LOUD) == found.encode([text.lower() for text in LOUD])).all()
    # once is enough
    assert "do_lower_case" not in settings_of(student)


def test_a_student_reads_as_many_tokens_as_its_teacher_or_its_positions(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = row_recipe(tmp_path, teacher={"model": str(teacher)}, losses={"embedding_output": {}})
    assert encoder(trained(recipe, tmp_path / "one")).max_seq_length == POSITIONS - 4
    assert not caplog.records
    change(teacher, READING, max_seq_length=20)
    assert settings_of(trained(recipe, tmp_path / "old"))["max_seq_length"] == 20
    change(teacher, READING, max_seq_length=10 * POSITIONS)
    student = trained(recipe, tmp_path / "two")
    assert encoder(student).max_seq_length == POSITIONS - 4
    assert encoder(student).encode(["w7 " * 2 * POSITIONS]).shape == (1, WIDTH)
    change(teacher, READING, max_seq_length=8)
    trained(recipe, tmp_path / "three")
    assert "cuts texts of teacher.model" in caplog.text and "after 8 tokens" in caplog.text


def test_a_student_of_another_kind_reads_as_many_tokens_as_it_says_itself(
    tmp_path: Path, teacher: Path
) -> None:
    plain = save_other(tmp_path / "other")
    pool = models.Pooling(models.Transformer(str(plain)).get_embedding_dimension(), "mean")
    start = SentenceTransformer(
        modules=[models.Transformer(str(plain), max_seq_length=20), pool], device="cpu"
    )
    start.save_pretrained(str(tmp_path / "start"))
    change(teacher, READING, max_seq_length=8)
    recipe = other_recipe(tmp_path, tmp_path / "start", teacher={"model": str(teacher)})
    student = trained(recipe, tmp_path / "one")
    assert encoder(student).max_seq_length == encoder(tmp_path / "start").max_seq_length == 20
    # and a plain one as many as it has positions for
    recipe = other_recipe(tmp_path, plain, teacher={"model": str(teacher)})
    student = trained(recipe, tmp_path / "two")
    assert encoder(student).max_seq_length == encoder(plain).max_seq_length != 8


@pytest.mark.parametrize(
    ("losses", "normalised", "expected"),
    [
        ({"embedding_output": {}}, False, "cosine"),
        ({"embedding_output": {}}, True, "dot"),
        ({"embedding_output": {"kind": "vector_mse"}}, False, "dot"),
        ({"similarity": {}, "hidden": {}}, False, "cosine"),
        ({"hidden": {}}, False, "dot"),
    ],
    ids=str,
)
def test_similarities_that_read_lengths_are_kept_where_those_were_learned(
    tmp_path: Path, losses: Any, normalised: bool, expected: str
) -> None:
    last = [models.Normalize()] if normalised else []
    teacher = save_sentences(tmp_path / "made", models.Pooling(WIDTH, "mean"), *last)
    change(teacher, LIBRARY, similarity_fn_name="dot")
    recipe = row_recipe(tmp_path, teacher={"model": str(teacher)}, losses=losses)
    student = trained(recipe, tmp_path / "run")
    assert encoder(student).similarity_fn_name == expected
    said = "its embeddings are compared by dot, but the losses compare directions alone"
    assert (said in (student / "README.md").read_text()) == (expected == "cosine")


def reported(tmp_path: Path, teacher: Path, **changes: Any) -> tuple[float, Path]:
    """The cosine that a run says of its held-out texts, and its student."""
    rows = [{"positive": f"w{number} w9 w{number + 1}"} for number in range(5, 25)]
    write_rows(tmp_path / "held.jsonl", rows)
    recipe = row_recipe(
        tmp_path,
        teacher={"model": str(teacher)},
        losses=changes.pop("losses", {"embedding_output": {}}),
        student={"layers": 2, "hidden_size": None, "intermediate_size": None},
        data={"columns": ["positive"], "heldout": str(tmp_path / "held.jsonl"), "block_size": 40},
    )
    found = fastkd.distill(recipe, {"train.steps": 1, **changes}, quiet=True)
    return found.summary["after"]["sentence_cosine"], found.folder / "student"


def cosine_of(student: Path, teacher: Path) -> float:
    """What whoever loads both folders finds for the same texts."""
    texts = [f"w{number} w9 w{number + 1}" for number in range(5, 25)]
    one, other = (encoder(folder).encode(texts).astype(float) for folder in (student, teacher))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / lengths).mean())


DEFAULT = {"prompts": {"query": "w30 w31 w32 "}, "default_prompt_name": "query"}


@pytest.mark.parametrize("settings", [DEFAULT, {"truncate_dim": 8}, {**DEFAULT, "truncate_dim": 8}])
def test_the_reported_cosine_is_that_of_both_folders(
    tmp_path: Path, teacher: Path, settings: dict[str, Any]
) -> None:
    change(teacher, LIBRARY, **settings)
    said, student = reported(tmp_path, teacher)
    assert said == pytest.approx(cosine_of(student, teacher), abs=1e-5)
    assert encoder(student).truncate_dim == settings.get("truncate_dim")
    assert encoder(student).default_prompt_name == settings.get("default_prompt_name")
    # a prompt of the recipe's own stands in for that of the folder
    bare = {"data.prompts": {"positive": ""}, "run.output": str(tmp_path / "bare")}
    plain, _ = reported(tmp_path, teacher, **bare)
    assert (plain != pytest.approx(said, abs=1e-5)) == ("prompts" in settings)


@pytest.mark.parametrize("size", [0, -1, "8", True])
def test_a_truncation_to_nothing_is_refused(tmp_path: Path, teacher: Path, size: Any) -> None:
    change(teacher, LIBRARY, truncate_dim=size)
    with pytest.raises(UserError, match=r"its truncate_dim is .*, expected a number from 1 on"):
        reported(tmp_path, teacher)


@pytest.mark.parametrize("losses", [{"embedding_output": {}}, {"hidden": {}}], ids=str)
def test_a_plain_decoder_is_pooled_as_the_library_pools_it(tmp_path: Path, losses: Any) -> None:
    torch.manual_seed(0)
    teacher = tmp_path / "decoder"
    AutoModelForCausalLM.from_config(tiny_config("qwen3")).save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    said, student = reported(tmp_path, teacher, losses=losses)
    assert encoder(teacher)[1].pooling_mode == encoder(student)[1].pooling_mode == "lasttoken"
    assert said == pytest.approx(cosine_of(student, teacher), abs=1e-5)


def test_where_no_text_is_read_by_itself_the_default_prompt_is_missed(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(teacher, LIBRARY, **DEFAULT)
    recipe = make_recipe(tmp_path, teacher={"model": str(teacher)})
    fastkd.distill(recipe, {"train.steps": 3}, quiet=True)
    assert "puts 'w30 w31 w32 ' before every text of teacher.model" in caplog.text


def test_a_further_teacher_that_has_another_default_prompt_is_named(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_sentences(tmp_path / "second", models.Pooling(WIDTH, "mean"))
    for folder in (teacher, other):
        change(folder, LIBRARY, **DEFAULT)
        teachers = {"model": str(teacher), "others": [str(other)]}
        recipe = row_recipe(tmp_path, teacher=teachers, losses={"embedding_output": {}})
        caplog.clear()
        assert find_default_prompt(load_recipe(recipe)) == "w30 w31 w32 "
        said = f"teacher.others {other}: reads texts with the prompt of the first teacher"
        assert (said in caplog.text) == (folder == teacher)


def run_of(tmp_path: Path, teacher: Path, ranks: Any, **evaluate: Any) -> Run:
    recipe = row_recipe(
        tmp_path,
        teacher={"model": str(teacher)},
        losses={"embedding_output": {}},
        data={"columns": ["query", "positive"], "prompts": {"positive": "w8 "}},
        # it needs something to be judged by
        evaluate={"pairs": {"a": str(tmp_path / "pairs.tsv")}, **evaluate},
    )
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\nw7\tw8\t1\nw9\tw10\t0\n")
    return set_up(load_recipe(recipe), ranks, progress=False)


def test_tasks_are_read_and_compared_as_the_folders_say(tmp_path: Path, teacher: Path) -> None:
    change(teacher, LIBRARY, similarity_fn_name="euclidean", prompts={"query": "w9 "})
    ranks = start_ranks()
    try:
        run = run_of(tmp_path, teacher, ranks)
        found = RunEncoder(run, "teacher")
        own = encoder(teacher)
        query, document = found.embed(["w9 w11", "w9 w12"]), found.embed(["w8 w11", "w8 w13"])
        for kind, expected in (("query", query), ("document", document)):
            texts = ["w11", "w12"] if kind == "query" else ["w11", "w13"]
            made = found.encode(
                [{"text": texts}],
                task_metadata=None,
                hf_split="",
                hf_subset="",
                prompt_type=kind,
            )
            np.testing.assert_allclose(made, expected, atol=1e-6)
        # whatever is neither is read by the default prompt
        change(teacher, LIBRARY, default_prompt_name="query")
        plain = RunEncoder(run_of(tmp_path, teacher, ranks), "teacher").encode(
            [{"text": ["w11", "w12"]}], task_metadata=None, hf_split="", hf_subset=""
        )
        np.testing.assert_allclose(plain, query, atol=1e-6)
        expected_pairs = own.similarity(query, document)
        torch.testing.assert_close(found.similarity(query, document), expected_pairs)
        pairwise = own.similarity_pairwise(query, document)
        torch.testing.assert_close(found.similarity_pairwise(query, document), pairwise)
        # of a student whose lengths mean nothing they are cosines
        cosines = torch.nn.functional.cosine_similarity(
            torch.from_numpy(query), torch.from_numpy(document)
        )
        student = RunEncoder(run, "student").similarity_pairwise(query, document)
        torch.testing.assert_close(student, cosines)
    finally:
        stop_ranks()


def test_modules_that_cannot_be_seen_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repo = "a" * 40, tmp_path / "hub" / "models--acme--encoder"
    snapshot = save_teacher(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = ModelSource("acme/encoder")
    assert is_unsure(source) and not is_unsure(ModelSource(str(snapshot)))
    losses = {"embedding_output": {}}
    recipe = row_recipe(tmp_path, teacher={"model": "acme/encoder"}, losses=losses)
    with pytest.raises(
        UserError, match=r"modules.json of teacher.model acme/encoder is not in the"
    ):
        trained(recipe, tmp_path / "run")
    # the hub has said that there are none
    missing = repo / ".no_exist" / commit
    missing.mkdir(parents=True)
    (missing / "modules.json").touch()
    assert not is_unsure(source)
