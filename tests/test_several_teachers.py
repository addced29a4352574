"""Several teachers: what their embeddings and scores come to, against formulas of their own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from test_recipe import refusal as recipe_refusal
from test_recipe import tree
from tiny_models import save_teacher, tiny_config, tiny_tokenizer, write_text
from tiny_others import save_other
from tiny_rows import random_rows, row_recipe, write_rows
from tiny_training import write_recipe, write_task
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastkd import distill, evaluate
from fastkd.capture import Capture
from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.losses.ensemble import Ensemble
from fastkd.recipe import load_recipe
from fastkd.reporting.report import model_heads
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.plan import plan_for_run
from fastkd.types import Combine, model_inputs

TEXTS = [row["query"] for row in random_rows(50, longest=7)]


@pytest.fixture
def ranks() -> Any:
    yield start_ranks()
    stop_ranks()


def norm(vector: Tensor) -> Tensor:
    return vector / sum(x * x for x in vector) ** 0.5


def defined(vectors: list[Tensor], combine: Combine) -> Tensor:
    """What the embeddings of one text come to."""
    if combine == "concatenate":
        return torch.cat([norm(vector) for vector in vectors])
    return sum((norm(vector) for vector in vectors), torch.zeros(())) / len(vectors)


@pytest.mark.parametrize(("combine", "dims"), [("mean", (6, 6, 6)), ("concatenate", (6, 2, 9))])
def test_embeddings_and_scores_of_several(combine: Combine, dims: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    seen = [Capture(embedding=draw(4, dim), logits=draw(4, 1)) for dim in dims]
    ensemble = Ensemble(dims, combine)
    found = ensemble(seen[0], seen[1:])
    assert found.embedding is not None and found.embedding.shape == (4, ensemble.dim)
    for number, vector in enumerate(found.embedding):
        each = [one.embedding[number] for one in seen if one.embedding is not None]
        torch.testing.assert_close(vector, defined(each, combine), atol=1e-14, rtol=0)
        score = sum(float(one.logits[number]) for one in seen) / 3  # type: ignore[index, arg-type]
        assert float(found.logits[number]) == pytest.approx(score, abs=1e-14)  # type: ignore[index, arg-type]


def save_sentences(folder: Path, seed: int, *modules: Any, **changes: Any) -> Path:
    plain = models.Transformer(str(save_teacher(folder / "plain", seed=seed, **changes)))
    whole = SentenceTransformer(modules=[plain, *modules], device="cpu")
    whole.save_pretrained(str(folder / "whole"))
    return folder / "whole"


def teachers_of(folder: Path) -> list[Path]:
    """Two models whose embeddings have 16 and 40 numbers, and one of 16."""
    torch.manual_seed(0)
    first = models.Pooling(32, "cls"), models.Dense(32, 16), models.Normalize()
    last = models.Pooling(32, "mean"), models.Dense(32, 16)
    return [
        save_sentences(folder / "first", 0, *first),
        save_sentences(folder / "wide", 1, models.Pooling(40, "mean"), hidden_size=40),
        save_sentences(folder / "last", 2, *last),
    ]


def recipe_of(folder: Path, teachers: list[Path], combine: str, **sections: Any) -> Path:
    train = write_rows(folder / "short.jsonl", random_rows(50, longest=7))
    given = {
        "losses": {"embedding_output": {}},
        "data": {"train": str(train), "columns": ["query"]},
        **sections,
    }
    first, *others = map(str, teachers)
    teacher = {"model": first, "others": others, "combine": combine, **given.pop("teacher", {})}
    return row_recipe(folder, teacher=teacher, **given)


def run_of(recipe: Path, ranks: Ranks) -> Run:
    return set_up(load_recipe(recipe), ranks, progress=False)


@pytest.mark.parametrize("combine", ["mean", "concatenate"])
def test_what_students_learn_is_what_the_teachers_give_out(
    tmp_path: Path, ranks: Ranks, combine: Combine
) -> None:
    first, wide, last = teachers_of(tmp_path)
    teachers = [first, last] if combine == "mean" else [first, wide, last]
    run = run_of(recipe_of(tmp_path, teachers, combine), ranks)
    encoded = [
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
        for folder in teachers
    ]
    expected = [defined(list(of_text), combine) for of_text in zip(*encoded, strict=True)]
    train = run.datamodule.encoded.train.sequences  # type: ignore[attr-defined]
    (batch,) = run.micro_batches().next_step(0)
    found = run.teacher(run.move(batch)).embedding
    assert torch.equal(run.embed("teacher", run.move(batch)), found)
    tokenizer = tiny_tokenizer()
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(texts) == 8 < len(train)
    for text, vector in zip(texts, found, strict=True):
        torch.testing.assert_close(vector, expected[TEXTS.index(text)], atol=2e-6, rtol=0)


def test_a_student_of_two_teachers_is_exported_to_the_space_of_both(tmp_path: Path) -> None:
    teachers = teachers_of(tmp_path)[:2]
    train = {"steps": 40, "learning_rate": 5e-3, "log_every": 40}
    done = distill(str(recipe_of(tmp_path, teachers, "concatenate", train=train)), quiet=True)
    before, after = (done.summary[when]["sentence_cosine"] for when in ("before", "after"))
    assert before < 0.4 and after > 0.6
    assert evaluate(str(done.folder), quiet=True).judged["sentence_cosine"] == pytest.approx(after)
    student = SentenceTransformer(str(done.folder / "student"), device="cpu")
    assert [type(module).__name__ for module in student] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
    ]
    found = student.encode(TEXTS, convert_to_tensor=True)
    assert found.shape == (50, 56)
    expected = torch.cat(
        [
            torch.nn.functional.normalize(
                SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
            )
            for folder in teachers
        ],
        dim=1,
    )
    assert torch.cosine_similarity(found, expected).mean() > 0.6
    notes = (done.folder / "student" / "README.md").read_text()
    assert "Dense 24 to 56 from losses.embedding_output, Normalize" in notes
    assert "teacher.others.1: whole; licence" in notes and str(tmp_path) not in notes


def test_a_cache_holds_what_the_teachers_come_to(tmp_path: Path, ranks: Ranks) -> None:
    teachers, folders = teachers_of(tmp_path), set()
    cache = {"cache": "int8", "cache_folder": str(tmp_path / "states")}
    for chosen, combine in ((teachers, "concatenate"), (teachers[:1], "mean"), (teachers, "mean")):
        chosen = [chosen[0], chosen[2]] if combine == "mean" and len(chosen) > 1 else chosen
        run = run_of(recipe_of(tmp_path, chosen, combine, teacher=cache), ranks)
        plan = plan_for_run(run)
        assert plan is not None
        dim = {"concatenate": 72, "mean": 16}[combine]
        (field,) = plan.layout.fields
        assert (field.name, field.shape) == ("embedding", (dim,))
        folders.add(plan.folder)
    assert len(folders) == 3


def save_reranker(folder: Path, seed: int, outputs: int = 1) -> Path:
    torch.manual_seed(seed)
    config = tiny_config("bert", num_labels=outputs)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rerankers(folder: Path, *outputs: int, **sections: Any) -> Path:
    given = [save_reranker(folder / f"r{n}", n, size) for n, size in enumerate(outputs)]
    sections = {"losses": {"score": {}}, "student": {"head": "sequence_classification"}} | sections
    data = {"train": str(write_rows(folder / "short.jsonl", random_rows(50, longest=7)))}
    combine = sections.pop("combine", "mean")
    return recipe_of(folder, given, combine, data=data, **sections)


def test_scores_of_several_rerankers_are_averaged(tmp_path: Path, ranks: Ranks) -> None:
    run = run_of(rerankers(tmp_path, 1, 1), ranks)
    (batch,) = run.micro_batches().next_step(0)
    inputs = model_inputs(batch)
    with torch.no_grad():
        each = [
            AutoModelForSequenceClassification.from_pretrained(tmp_path / name)(**inputs).logits
            for name in ("r0", "r1")
        ]
    torch.testing.assert_close(run.teacher(batch).logits, (each[0] + each[1]) / 2)


def test_rerankers_are_held_against_the_mean(tmp_path: Path) -> None:
    train = {"steps": 2, "log_every": 2}
    done = distill(str(rerankers(tmp_path, 1, 1, train=train)), quiet=True)
    agreement = done.summary["after"]["agreement"]
    # what stands beside the student's numbers is one model's
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r0")
    assert done.summary["parameters"]["teacher"] == first.num_parameters()
    assert model_heads(done.summary) == ["first of 2 teachers", "student"]
    again = evaluate(str(done.folder), quiet=True).judged["agreement"]
    assert again == pytest.approx(agreement, abs=1e-5)
    alone = evaluate(str(done.folder), {"teacher.others": []}, quiet=True).judged["agreement"]
    assert abs(alone["mean_absolute_difference"] - agreement["mean_absolute_difference"]) > 1e-3


REFUSED = {
    "no mean": ({}, [0, 1], "mean", "embeddings have 16, 40 numbers; set it to concatenate"),
    "nothing that reads them": (
        {"losses": {"hidden": {}}},
        [0, 2],
        "mean",
        "no loss reads embeddings or scores",
    ),
    "one pooling": (
        {"losses": {"embedding_output": {"pooling": "cls"}}},
        [0, 2],
        "mean",
        "losses.embedding_output.pooling is given, but each of several teachers pools",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_teachers_that_have_nothing_in_common_are_refused(
    tmp_path: Path, ranks: Ranks, case: str
) -> None:
    sections, chosen, combine, message = REFUSED[case]
    teachers = [teachers_of(tmp_path)[number] for number in chosen]
    with pytest.raises(UserError, match=message) as refused:
        run_of(recipe_of(tmp_path, teachers, combine, **sections), ranks)
    assert "\n" not in str(refused.value)


def test_heads_that_have_no_mean_are_refused(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(UserError, match="its head gives 2 numbers, but the first teacher's 1"):
        run_of(rerankers(tmp_path, 1, 2), ranks)
    with pytest.raises(UserError, match=r"is concatenate, but losses.score reads what heads"):
        run_of(rerankers(tmp_path, 1, 1, combine="concatenate"), ranks)


NLI = ("entailment", "neutral", "contradiction")


def classifiers(folder: Path, second: Sequence[str], **config: Any) -> Path:
    """A recipe of two teachers that are one, but for the order of the second's classes."""
    recipe = rerankers(folder, 3, 3, losses={"logits": {}})
    first = AutoModelForSequenceClassification.from_pretrained(folder / "r0")
    first.config.id2label = dict(enumerate(NLI))
    first.save_pretrained(folder / "r0")
    order = [NLI.index(name.lower()) if name.lower() in NLI else n for n, name in enumerate(second)]
    with torch.no_grad():
        for weight in first.classifier.parameters():
            weight.copy_(weight[order].clone())
    first.config.id2label = dict(enumerate(second))
    first.config.update(config)
    first.save_pretrained(folder / "r1")
    return recipe


def test_classes_of_a_second_teacher_follow_the_first(tmp_path: Path, ranks: Ranks) -> None:
    run = run_of(classifiers(tmp_path, ("Contradiction", "ENTAILMENT", "neutral")), ranks)
    (batch,) = run.micro_batches().next_step(0)
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r0")
    with torch.no_grad():
        expected = first(**model_inputs(batch)).logits
    torch.testing.assert_close(run.teacher(batch).logits, expected)


def test_classes_that_are_not_the_first_teachers_are_refused(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"gives yes, no, maybe, but the first teacher's entailm"):
        run_of(classifiers(tmp_path, ("yes", "no", "maybe")), ranks)
    other = {"problem_type": "multi_label_classification"}
    recipe = classifiers(tmp_path, NLI, **other)
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r0")
    first.config.problem_type = "single_label_classification"
    first.save_pretrained(tmp_path / "r0")
    with pytest.raises(UserError, match="its problem_type is multi_label_classification, but"):
        run_of(recipe, ranks)
    run_of(classifiers(tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2")), ranks)
    assert "taken to be of one order" in caplog.text


def test_another_tokenizer_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    other = save_other(tmp_path / "other", "bert", hidden_size=32)
    first = save_teacher(tmp_path / "first")
    with pytest.raises(UserError, match=r"teacher.others .*: its tokenizer is not the teacher's"):
        run_of(recipe_of(tmp_path, [first, other], "mean"), ranks)


def reframed(folder: Path, **given: Any) -> None:
    """Let a folder's tokenizer put other tokens around texts."""
    tokenizer = tiny_tokenizer()
    post = TemplateProcessing(**given, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("single", ["[CLS] $A", "$A [SEP]"])
def test_a_teacher_that_would_read_other_tokens_around_a_text_is_refused(
    tmp_path: Path, ranks: Ranks, single: str
) -> None:
    teachers = teachers_of(tmp_path)[::2]
    reframed(teachers[1], single=single)
    made = re.escape(single.replace("$A", "[UNK] [UNK]"))
    expected = f"^teacher.others {teachers[1]}: its tokenizer makes '{made}' of 'a text', but all"
    in_rows = recipe_of(tmp_path, teachers, "mean")
    blocks = {"train": str(write_text(tmp_path / "text.txt")), "documents": "line", "columns": None}
    for recipe in (in_rows, recipe_of(tmp_path, teachers, "mean", data=blocks)):
        with pytest.raises(UserError, match=expected) as refused:
            run_of(recipe, ranks)
        assert "\n" not in str(refused.value)


def changed(settings: Path, **given: Any) -> None:
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **given}))


PAIR = "[CLS] $A [SEP] $B:1 [SEP]:1"


def test_of_rerankers_the_frames_of_pairs_count(tmp_path: Path, ranks: Ranks) -> None:
    recipe = rerankers(tmp_path, 1, 1)
    single = "[CLS] $A [SEP]"
    reframed(tmp_path / "r0", single=single, pair=PAIR)
    with pytest.raises(UserError, match=r"of 'a text' and 'another', but all teachers read what"):
        run_of(recipe, ranks)
    # no text is read by itself
    reframed(tmp_path / "r1", single="$A", pair=PAIR)
    run_of(recipe, ranks)
    names = ["input_ids", "attention_mask"]
    changed(tmp_path / "r1" / "tokenizer_config.json", model_input_names=names)
    with pytest.raises(UserError, match="token_type_ids are no part of its tokenizer's pairs, but"):
        run_of(recipe, ranks)


def test_a_further_teacher_that_reads_less_of_a_text_is_named(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    first, _, last = teachers_of(tmp_path)
    changed(last / "sentence_bert_config.json", max_seq_length=6)
    with caplog.at_level(logging.WARNING):
        run_of(recipe_of(tmp_path, [first, last], "mean"), ranks)
    said = f"SentenceTransformer cuts texts of teacher.others {last} after 6 tokens: of longer ones"
    assert said in caplog.text and "texts of teacher.model" not in caplog.text
    caplog.clear()
    changed(last / "tokenizer_config.json", truncation_side="left")
    with caplog.at_level(logging.WARNING):
        run_of(recipe_of(tmp_path, [first, last], "mean"), ranks)
    assert f"{last}: reads long texts as the first teacher does, cut on the right" in caplog.text


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"placement": "shard"}, "placement is shard, in which one can run"),
        ({"dtype": "int8"}, "dtype is int8, in which one teacher can run"),
    ],
)
def test_teachers_are_whole(teacher: dict[str, str], message: str) -> None:
    given = tree()
    given["teacher"] |= {"others": ["x"], **teacher}
    assert message in recipe_refusal(given)


def test_a_task_has_one_teacher(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    path = write_recipe(
        tmp_path, "run", teacher={"model": "x", "others": ["y"]}, losses={"logits": {}}
    )
    with pytest.raises(UserError, match="a task is learned from one teacher; leave others out"):
        load_recipe(path)
