"""Question answering: read, cut into windows, scored, and learned by a teacher and its student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import assert_same_run
from tiny_tasks import encoded as examples_of
from tiny_tasks import tuned_student, word_tokenizer, write_lines
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast

import fastkd
from fastkd.capture import Capture
from fastkd.data.tasks import Columns, Task, encode_examples
from fastkd.data.tasks.answers import answer_f1, answers_of, best_span, exact_match
from fastkd.data.tasks.questions import EncodedQuestions, QuestionForm, label_of, read_questions
from fastkd.data.tasks.token_outputs import TokenOutputs
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses.base import ModelPair
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses, parse_recipe

TASK = Task(
    name="questions",
    kind="question_answering",
    columns=Columns(texts=("question", "context"), label="answers"),
)
CONTEXT = "the dogs runs, the old cat sleeps. a small bird sees the red houses"


def squad(question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
    }


ROWS = [
    squad("not cold", CONTEXT, "old cat", "cat"),
    squad("dark", CONTEXT, "red houses"),
    squad("blue", "green fish", "fish"),
]


def write_rows(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> Path:
    write_lines(folder / f"{split}.jsonl", *map(json.dumps, rows))
    return folder


def test_every_form_of_answers_is_the_same_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "lists", ROWS)
    pairs = [
        {
            **row,
            "answers": [
                {"text": text, "answer_start": start}
                for text, start in zip(*row["answers"].values(), strict=True)
            ],
        }
        for row in ROWS
    ]
    write_rows(tmp_path / "pairs", pairs)
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    forms = ("lists", "pairs", "saved", "parquet")
    read = [read_questions(TASK, tmp_path / form, "train", tmp_path) for form in forms]
    assert len({found.digest for found in read}) == 1
    assert read[0].answers[0] == (("old cat", CONTEXT.index("old")), ("cat", CONTEXT.index("cat")))


REFUSED: dict[str, tuple[Any, str]] = {
    "another place": (
        {"text": ["cat"], "answer_start": [0]},
        "answer 'cat' of column 'answers'",
    ),
    "before": ({"text": ["cat"], "answer_start": [-3]}, "is to start at character -3 of 'context'"),
    "none": ({"text": [], "answer_start": []}, "column 'answers' has no answer"),
    "empty": ({"text": [""], "answer_start": [0]}, "answer '' of column 'answers' is to start"),
    "uneven": ({"text": ["cat"], "answer_start": []}, 'expected {"text": [...], "answer_st'),
    "no list": ("cat", "column 'answers' holds 'cat', expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_gone_wrong_is_refused(name: str, tmp_path: Path) -> None:
    answers, said = REFUSED[name]
    write_rows(tmp_path, [{"question": "q", "context": CONTEXT, "answers": answers}])
    with pytest.raises(UserError, match=r"train\.jsonl, line 1") as refused:
        read_questions(TASK, tmp_path, "train", tmp_path)
    assert said in str(refused.value)


def encoded(
    folder: Path, rows: list[dict[str, Any]], max_length: int, shared: int
) -> EncodedQuestions:
    source = read_questions(TASK, write_rows(folder, rows), "train", folder)
    found = encode_examples(
        source,
        word_tokenizer(),
        max_length=max_length,
        token_types=True,
        cache=folder / "cache",
        progress=False,
        form=QuestionForm(source, shared),
    )
    assert isinstance(found, EncodedQuestions)
    return found


def test_windows_hold_all_of_a_context_and_know_their_answers(tmp_path: Path) -> None:
    examples = encoded(tmp_path, ROWS, 12, 3)
    assert len(examples) > len(ROWS) == len(examples.source)
    whole = encoded(tmp_path, ROWS, 64, 3)
    assert whole.questions.tolist() == [0, 1, 2]
    held = {number: 0 for number in range(3)}
    covered: dict[int, set[int]] = {number: set() for number in range(3)}
    for window, number in enumerate(examples.questions.tolist()):
        first, end = examples.offsets[window : window + 2]
        assert end - first <= 12
        spans = examples.spans[first:end]
        context, (answer, _) = examples.source.texts[number][1], examples.source.answers[number][0]
        for begin, stop in spans[spans[:, 0] >= 0].tolist():
            covered[number] |= set(range(begin, stop))
        start, last = examples.labels[window]
        if (start, last) == (0, 0):
            assert answer not in context[spans[:, 0].max(initial=0) :] or spans[0, 0] < 0
            continue
        assert context[spans[start, 0] : spans[last, 1]] == answer
        held[number] += 1
    assert all(held.values())
    for number, (_, context) in enumerate(examples.source.texts):
        assert covered[number] == {n for n, letter in enumerate(context) if letter != " "}
    batch = examples.batch([0, 1])
    assert batch["labels"].tolist() == examples.labels[:2].tolist()


def test_a_question_without_room_for_its_context_is_refused(tmp_path: Path) -> None:
    long = squad("dark dark dark dark dark", CONTEXT, "cat")
    with pytest.raises(UserError, match=r"question 2 takes 5 of task\.max_length=10 tokens"):
        encoded(tmp_path, [ROWS[0], long], 10, 2)


def test_the_best_span_is_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        start, end = generator.normal(size=(2, 45)).astype(np.float32)
        allowed = generator.random(45) < 0.7
        spans = [
            (float(start[i] + end[j]), i, j)
            for i in range(45)
            for j in range(i, min(i + 30, 45))
            if allowed[i] and allowed[j]
        ]
        assert best_span(start, end, allowed) == pytest.approx(max(spans))


def test_the_answer_is_that_of_the_surest_window(tmp_path: Path) -> None:
    examples = encoded(tmp_path, ROWS, 12, 3)
    logits = np.zeros((len(examples.tokens), 2), dtype=np.float32)
    for window, (start, last) in enumerate(examples.labels.tolist()):
        first = examples.offsets[window]
        # windows without the answer point at the first token, which is no answer
        logits[first + start, 0] = logits[first + last, 1] = 5
    assert answers_of(examples, logits) == ["old cat", "red houses", "fish"]


WORDS = [
    ("The Old cat!", "old cat", 1.0, 1.0),
    ("a cat", "old cat", 0.0, 2 / 3),
    ("cat cat", "cat", 0.0, 2 / 3),
    ("the", "an", 1.0, 1.0),
    ("the", "cat", 0.0, 0.0),
    ("dog", "cat", 0.0, 0.0),
]


@pytest.mark.parametrize(("found", "right", "exact", "f1"), WORDS)
def test_answers_are_compared_as_squad_does(
    found: str, right: str, exact: float, f1: float
) -> None:
    assert exact_match(found, right) == exact
    assert answer_f1(found, right) == pytest.approx(f1)


@pytest.mark.parametrize("kind", ["kl", "js", "mse", "total_variation", "cross_entropy"])
def test_losses_do_not_see_padding_however_a_batch_is_cut(kind: str) -> None:
    section = Losses.model_validate({"logits": {"kind": kind}, "labels": {}})
    pair = ModelPair((4, 4), head="question_answering", outputs=2)
    objective = Objective(section, make_layer_map("uniform", 2, 2), pair)
    generator = torch.Generator().manual_seed(0)
    sizes, labels = [7, 3, 5, 4], torch.tensor([[1, 4], [0, 0], [2, 2], [3, 3]])
    student, teacher = (
        torch.randn(4, 7, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student.requires_grad_()
    mask = (torch.arange(7) < torch.tensor(sizes)[:, None]).long()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "labels": labels}
    whole = objective.divisors(inputs)
    found = torch.zeros(2, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rows, width in (([0], 7), ([1, 2, 3], 5)):
        part = {n: t[rows] if n == "labels" else t[rows, :width] for n, t in inputs.items()}
        captures = (Capture(logits=side[rows, :width]) for side in (student, teacher))
        loss, parts = objective(*captures, part, objective.divisors(part) / whole)
        total = total + loss
        found += parts[0]
    (gradient,) = torch.autograd.grad(total, student)

    soft, hard = [], []
    for row, size in enumerate(sizes):
        for end in range(2):
            mine, theirs = student[row, :size, end], teacher[row, :size, end]
            p, t = mine.softmax(0), theirs.softmax(0)
            mean = (p + t) / 2
            soft.append(
                {
                    "kl": (t * (t / p).log()).sum(),
                    "js": ((t * (t / mean).log()).sum() + (p * (p / mean).log()).sum()) / 2,
                    "mse": (mine - theirs).square().mean(),
                    "total_variation": (p - t).abs().sum() / 2,
                    "cross_entropy": -(t * p.log()).sum(),
                }[kind]
            )
            hard.append(cross_entropy(mine, labels[row, end]))
    expected = torch.stack([torch.stack(soft).mean(), torch.stack(hard).mean()])
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


def pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def question_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Contexts in which two words of their own kinds stand beside each other: the answer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[str]:
        return [f"w{n}" for n in torch.randint(low, high, (size,), generator=generator).tolist()]

    rows = []
    for _ in range(count):
        before, behind = (draw(16, 48, int(draw(3, 18)[0][1:])) for _ in range(2))
        answer = " ".join([*draw(8, 12), *draw(12, 16)])
        rows.append(squad("w5 w6", " ".join([*before, answer, *behind]), answer))
    return rows


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task, an encoder, and a teacher that was tuned of it."""
    folder = tmp_path_factory.mktemp("questions")
    write_rows(folder / "task", question_rows(64, 0))
    write_rows(folder / "task", question_rows(24, 1), "dev")
    tiny_model("bert", initializer_range=0.05).save_pretrained(folder / "encoder")
    pair_tokenizer().save_pretrained(folder / "encoder")
    tree = {
        "model": str(folder / "encoder"),
        "task": task_section(folder),
        "train": {"steps": 40, "batch_size": 16, "learning_rate": 8e-3, "warmup_steps": 5},
        "run": {"output": str(folder / "teacher")},
    }
    summary = fastkd.finetune(tree, quiet=True).summary
    before, after = (summary[key]["scores"]["dev"] for key in ("before", "after"))
    assert before["exact_match"] < 0.3 and after["exact_match"] > 0.9, (before, after)
    assert summary["after"]["score"] == after["answer_f1"] >= after["exact_match"]
    assert summary["after"]["examples"] == 24 and summary["task_examples"] > 64
    return folder


def task_section(folder: Path) -> dict[str, Any]:
    return {
        "name": "questions",
        "kind": "question_answering",
        "source": str(folder / "task"),
        "max_length": 24,
        "stride": 6,
        "cache": str(folder / "cache"),
    }


def distillation(folder: Path, name: str, **train: Any) -> dict[str, Any]:
    losses = {"attention": {}, "logits": {"kind": "mse"}, "labels": {}}
    given = {"steps": 4, "learning_rate": 5e-3, **train}
    return tuned_student(folder, name, task_section(folder), losses, **given)


def test_a_student_learns_from_a_tuned_teacher_and_answers(tuned: Path) -> None:
    result = fastkd.distill(distillation(tuned, "student", steps=40), quiet=True)
    scores = {key: result.summary[key]["score"] for key in ("teacher", "before", "after")}
    assert scores["after"] > 0.8 > 0.5 > scores["before"], scores
    folder = tuned / "student" / "student"
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3
    hits, rows = 0, question_rows(24, 1)
    for row in rows:
        read = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=24,
            stride=6,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        offsets = read.pop("offset_mapping")
        del read["overflow_to_sample_mapping"]
        with torch.no_grad():
            output = model(**read)
        best, answer = -np.inf, ""
        for window, spans in enumerate(offsets.tolist()):
            places = [n for n, of in enumerate(read.sequence_ids(window)) if of == 1]
            for first in places:
                for last in range(first, places[-1] + 1):
                    logits = output.start_logits[window, first] + output.end_logits[window, last]
                    if logits > best:
                        best, answer = logits, row["context"][spans[first][0] : spans[last][1]]
        hits += answer == row["answers"]["text"][0]
    found = result.summary["after"]["scores"]["dev"]["exact_match"]
    assert hits / len(rows) == pytest.approx(found)
    assert fastkd.evaluate(result).judged["scores"] == result.summary["after"]["scores"]


def test_a_cut_changes_nothing(tuned: Path) -> None:
    fastkd.distill(distillation(tuned, "whole", steps=2), quiet=True)
    fastkd.distill(distillation(tuned, "cut", steps=2, micro_batch_size=4), quiet=True)
    assert_same_run(tuned / "cut", tuned / "whole", losses=1e-5, weights=2e-5)


WRONG = {
    "labels": ({"task": {"labels": ["a", "b"]}}, "labels is for another kind of task, but kind is"),
    "packed": ({"task": {"padding": "none"}}, "padding: none is for another kind of task"),
    "standardised": (
        {"losses": {"logits": {"standardize": True}}},
        "losses.logits has standardize, which is for logits of classes, but student.head is questi",
    ),
    "a stride of texts": (
        {"task": {"kind": "sequence_classification"}},
        "stride is for contexts of questions, but kind is sequence_classification",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_refused(name: str, tmp_path: Path) -> None:
    changes, said = WRONG[name]
    tree = distillation(tmp_path, "run")
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    with pytest.raises(UserError) as refused:
        parse_recipe(tree)
    assert said in str(refused.value)


def test_an_answer_has_thirty_tokens_at_most_and_none_that_only_touches_it() -> None:
    start, end = np.zeros((2, 40), dtype=np.float32)
    start[0] = end[30] = 9.0
    _, first, last = best_span(start, end, np.ones(40, dtype=bool))
    assert last - first < 30
    # the token before ends where the answer begins, the one behind begins where it ends
    assert label_of(np.array([[0, 3], [3, 6], [6, 9]]), 3, 6) == [1, 1]


def test_what_stands_at_padding_may_be_anything() -> None:
    outputs = TokenOutputs(
        {"one": examples_of([2, 3])}, torch.device("cpu"), "student", dtype=torch.int64
    )
    logits = torch.arange(12.0).view(2, 3, 2)
    logits[0, 2] = torch.nan
    outputs.add(torch.arange(2), logits, torch.arange(6).view(2, 3))
    ((_, _, kept),) = outputs.sets(Ranks(0, 1, torch.device("cpu")))
    assert kept.tolist() == [0, 1, 3, 4, 5]
