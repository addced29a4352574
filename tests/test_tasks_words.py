"""Token classification: read, tokenised, scored, and learned by a teacher and its student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import assert_same_run, run_variants
from tiny_tasks import tuned_student, word_tokenizer, write_lines
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification, pipeline

import fastkd
from fastkd.capture import Capture
from fastkd.data.tasks import Columns, Task, encode_examples
from fastkd.data.tasks.entities import WordEvaluator, measure_words
from fastkd.data.tasks.words import EncodedWords, WordForm, first_tokens, read_words
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses.base import ModelPair
from fastkd.losses.counts import DIVISORS
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses, parse_recipe
from fastkd.types import IGNORE_INDEX

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TASK = Task(
    name="names",
    kind="token_classification",
    columns=Columns(texts=("tokens",), label="tags"),
    labels=LABELS,
)
TEXTS = [
    (("the", "dogs", "sees", "old", "houses"), ("O", "B-PER", "O", "B-LOC", "I-LOC")),
    (("fish", "jumps"), ("I-PER", "O")),
    (("cat",), ("O",)),
]


def write_json(path: Path, texts: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> Path:
    rows = [json.dumps({"tokens": list(words), "tags": list(tags)}) for words, tags in texts]
    return write_lines(path, *rows)


def test_every_form_of_a_file_is_the_same_split(tmp_path: Path) -> None:
    write_json(tmp_path / "spelled" / "train.jsonl", TEXTS)
    numbers = [(words, [LABELS.index(tag) for tag in tags]) for words, tags in TEXTS]
    write_json(tmp_path / "numbered" / "train.jsonl", numbers)
    lines = ["-DOCSTART- -X- O O", ""]
    for words, tags in TEXTS:
        lines += [f"{word} NN {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
    write_lines(tmp_path / "conll" / "train.conll", *lines)
    # as the hub has them, in an order of their own
    names = sorted(LABELS, reverse=True)
    table = datasets.Dataset.from_dict(
        {
            "tokens": [list(words) for words, _ in TEXTS],
            "tags": [[names.index(tag) for tag in tags] for _, tags in TEXTS],
        },
        features=datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "tags": datasets.List(datasets.ClassLabel(names=names)),
            }
        ),
    )
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    forms = ("spelled", "numbered", "conll", "saved", "parquet")
    read = [read_words(TASK, tmp_path / form, "train", tmp_path) for form in forms]
    assert len({found.digest for found in read}) == 1
    assert [found.words for found in read] == [[words for words, _ in TEXTS]] * 5
    assert [LABELS[n] for n in read[0].labels] == [tag for _, tags in TEXTS for tag in tags]


REFUSED = {
    "another number": ([(("a", "b"), ("O",))], "line 1: 2 words in 'tokens', but 1 classes in 'ta"),
    "unknown class": (
        [(("a",), ("B-ORG",))],
        "class 'B-ORG' in column 'tags', expected one of O, ",
    ),
    "unknown number": ([(("a",), (5,))], "class 5 in column 'tags', expected one of O, B-PER"),
    "a truth value": ([(("a",), (True,))], "class True in column 'tags'"),
    "no words": ([((), ())], "line 1: column 'tokens' has no words; remove the row"),
    "no text": ([((7,), ("O",))], "line 1: column 'tokens'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_gone_wrong_is_refused(name: str, tmp_path: Path) -> None:
    texts, said = REFUSED[name]
    write_json(tmp_path / "train.jsonl", texts)
    with pytest.raises(UserError, match=r"train\.jsonl, line 1") as refused:
        read_words(TASK, tmp_path, "train", tmp_path)
    assert said in str(refused.value)


def test_a_file_without_lists_or_classes_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", "tokens\ttags", "a b\tO O")
    write_lines(tmp_path / "dev.conll", "dog O", "cat")
    with pytest.raises(UserError, match="line 2: column 'tokens' holds str, expected a list"):
        read_words(TASK, tmp_path, "train", tmp_path)
    with pytest.raises(UserError, match="line 2: one column, 'cat', expected a word and a class"):
        read_words(TASK, tmp_path, "dev", tmp_path)


def encoded(texts: Sequence[tuple[Any, Any]], folder: Path, max_length: int = 32) -> EncodedWords:
    write_json(folder / "train.jsonl", texts)
    source = read_words(TASK, folder, "train", folder)
    found = encode_examples(
        source,
        word_tokenizer(),
        max_length=max_length,
        token_types=True,
        cache=folder / "cache",
        progress=False,
        form=WordForm(source),
    )
    assert isinstance(found, EncodedWords)
    return found


def test_a_label_stands_at_the_first_token_of_a_word(tmp_path: Path) -> None:
    examples = encoded(TEXTS, tmp_path)
    batch = examples.batch([0, 1])
    # [CLS] the dog ##s sees old house ##s [SEP]; [CLS] fish jumps [SEP]
    o, ignored = 0, IGNORE_INDEX
    rows = [[ignored, o, 1, ignored, o, 3, 4, ignored, ignored], [ignored, 2, o, ignored]]
    for row, expected in zip(batch["labels"].tolist(), rows, strict=True):
        assert row == expected + [ignored] * (len(row) - len(expected))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_what_a_cut_text_lost_is_predicted_by_nobody(tmp_path: Path) -> None:
    examples = encoded(TEXTS, tmp_path, max_length=6)
    said = examples.of_words(np.asarray(examples.labels).astype(np.int64))
    assert said.tolist() == [0, 1, 0, -1, -1, 2, 0, 0]


def test_words_are_judged_wherever_their_texts_stand(tmp_path: Path) -> None:
    examples = encoded(TEXTS, tmp_path)
    tokens = torch.from_numpy(np.asarray(examples.labels).astype(np.int64)).clamp(min=0)
    first, second, third = tokens.split([len(tokens) - 7, 4, 3])
    right = torch.nn.utils.rnn.pad_sequence([first, second, third], batch_first=True)

    def judged(classes: torch.Tensor) -> dict[str, Any]:
        evaluator = WordEvaluator(TASK, {"dev": examples}, torch.device("cpu"))
        logits = torch.nn.functional.one_hot(classes, len(LABELS)).float()
        evaluator.add(torch.tensor([2, 0]), logits[[2, 0]], None)
        # the second row fills the batch up
        evaluator.add(torch.tensor([1]), logits[[1, 0]], None)
        return evaluator.results(Ranks(0, 1, torch.device("cpu")))

    found = judged(right)
    assert found["score"] == 1 and found["class_f1"] == {"dev": {"PER": 1, "LOC": 1}}
    assert found["examples"] == 3 and found["one_class"] == {}
    nothing = judged(torch.zeros_like(right))
    assert nothing["score"] == 0 and nothing["one_class"] == {"dev": "O"}


def test_words_that_a_tokenizer_leaves_out_or_joins_keep_the_others_in_place() -> None:
    words = ["a", "", "bcd", "\u200b", "ef"]
    # "a", nothing, "bc" "d", nothing, "ef"; a space may belong to a token
    offsets = [(0, 0), (0, 1), (2, 5), (5, 6), (8, 11), (0, 0)]
    assert first_tokens(words, offsets) == [-1, 0, 2, -1, 4, -1]
    # one token holds two words, the next the end of the second
    assert first_tokens(["ab", "cd"], [(0, 4), (4, 5)]) == [0, 1]


def entities_by_hand(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """By the definition, a word at a time."""
    found, kind, begin = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        if kind and (prefix != "I" or this != kind):
            found.add((kind, begin, place))
            kind = ""
        if prefix != "O" and not kind:
            kind, begin = this, place
    return found


def test_entities_are_counted_as_they_are_defined() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        sizes = generator.integers(1, 7, size=5)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        right = generator.integers(0, len(LABELS), size=offsets[-1])
        said = np.where(
            generator.random(len(right)) < 0.6, right, generator.integers(-1, 5, size=len(right))
        )
        found, by_type = measure_words(TASK, said, right, offsets)
        there, given = (
            {
                (text, *entity)
                for text in range(5)
                for entity in entities_by_hand(
                    ["O" if n < 0 else LABELS[n] for n in of[offsets[text] : offsets[text + 1]]]
                )
            }
            for of in (right, said)
        )
        for kind in ("", "PER", "LOC"):
            one, two = ({e for e in of if kind in ("", e[1])} for of in (there, given))
            hits = len(one & two)
            precision, recall = hits / max(len(two), 1), hits / max(len(one), 1)
            f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
            assert ({"": found["entity_f1"]} | by_type)[kind] == pytest.approx(f1), kind
        assert found["token_accuracy"] == pytest.approx(float(np.mean(said == right)))


def test_classes_that_name_no_entities_are_scored_by_themselves() -> None:
    task = Task(
        name="parts",
        kind="token_classification",
        columns=TASK.columns,
        labels=("NOUN", "VERB", "DET"),
    )
    right, said = np.array([0, 0, 1, 1]), np.array([0, 1, 1, -1])
    found, by_class = measure_words(task, said, right, np.array([0, 4]))
    assert found == {"token_accuracy": 0.5}
    assert by_class == {"NOUN": pytest.approx(2 / 3), "VERB": 0.5, "DET": 0.0}
    with pytest.raises(UserError, match="entity_f1 scores entities, but labels are NOUN, VERB"):
        Task(
            name="parts",
            kind="token_classification",
            columns=TASK.columns,
            labels=("NOUN", "VERB"),
            metrics=("entity_f1",),
        )


KINDS = ["kl", "mse", "total_variation"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_means_over_labelled_tokens_however_a_batch_is_cut(kind: str) -> None:
    section = Losses.model_validate({"logits": {"kind": kind}, "labels": {}})
    pair = ModelPair((4, 4), head="token_classification", outputs=5)
    objective = Objective(section, make_layer_map("uniform", 2, 2), pair)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(4, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, 5, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) < 0.5] = IGNORE_INDEX
    # a micro-batch of its own without any
    labels[3] = IGNORE_INDEX
    student.requires_grad_()
    inputs = {"input_ids": torch.zeros(4, 6, dtype=torch.long), "labels": labels}
    whole = objective.divisors(inputs)
    assert whole[DIVISORS.index("labels")] == (labels != IGNORE_INDEX).sum()

    found = torch.zeros(2, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rows in ([0, 1], [2], [3]):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        captures = (Capture(logits=side[rows]) for side in (student, teacher))
        shares = objective.divisors(part) / whole
        loss, parts = objective(*captures, part, shares)
        total = total + loss
        found += parts[0]
    (gradient,) = torch.autograd.grad(total, student)

    counted = labels != IGNORE_INDEX
    mine, theirs = student[counted], teacher[counted]
    p, t = mine.softmax(-1), theirs.softmax(-1)
    soft = {
        "kl": (t * (t.log() - p.log())).sum(-1),
        "mse": (mine - theirs).square().mean(-1),
        "total_variation": (p - t).abs().sum(-1) / 2,
    }[kind].mean()
    hard = cross_entropy(mine, labels[counted])
    (expected,) = torch.autograd.grad(soft + hard, student)
    torch.testing.assert_close(found, torch.stack([soft, hard]).detach())
    torch.testing.assert_close(gradient, expected)


def write_names(folder: Path) -> Path:
    """Words from w8 on are names of people, from w12 on of places; two in a row are one."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("dev", 24)):
        texts = []
        for _ in range(count):
            length = int(torch.randint(4, 16, (1,), generator=generator))
            ids = torch.randint(8, 32, (length,), generator=generator).tolist()
            kinds = ["PER" if n < 12 else "LOC" if n < 16 else "" for n in ids]
            tags = [
                "O" if not kind else f"I-{kind}" if kind == before else f"B-{kind}"
                for kind, before in zip(kinds, ["", *kinds], strict=False)
            ]
            texts.append(([f"w{n}" for n in ids], tags))
        write_json(folder / f"{split}.jsonl", texts)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task, an encoder, and a teacher that was tuned of it."""
    folder = tmp_path_factory.mktemp("words")
    write_names(folder / "task")
    tiny_model("bert", initializer_range=0.05).save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    tree = {
        "model": str(folder / "encoder"),
        "task": task_section(folder),
        "train": {"steps": 80, "batch_size": 16, "learning_rate": 5e-3, "warmup_steps": 10},
        "run": {"output": str(folder / "teacher")},
    }
    result = fastkd.finetune(tree, quiet=True)
    before, after = (result.summary[key]["scores"]["dev"] for key in ("before", "after"))
    assert before["entity_f1"] < 0.4 and after["entity_f1"] > 0.7, (before, after)
    assert set(after) == {"entity_f1", "token_accuracy"}
    assert set(result.summary["after"]["class_f1"]["dev"]) == {"PER", "LOC"}
    # one class for every word names no entity
    assert result.summary["after"]["baseline"]["score"] < 0.4
    assert result.summary["after"]["score"] == after["entity_f1"]
    return folder


def task_section(folder: Path) -> dict[str, Any]:
    return {
        "name": "names",
        "kind": "token_classification",
        "source": str(folder / "task"),
        "labels": list(LABELS),
        "max_length": 32,
        "cache": str(folder / "cache"),
    }


def distillation(folder: Path, name: str, **train: Any) -> dict[str, Any]:
    losses: dict[str, Any] = {"attention": {}, "hidden": {}, "logits": {}, "labels": {}}
    given = {"steps": 2, "learning_rate": 2e-3, "max_grad_norm": 0.5, **train}
    return tuned_student(folder, name, task_section(folder), losses, **given)


def test_a_student_learns_from_a_tuned_teacher_and_works_in_a_pipeline(tuned: Path) -> None:
    tree = distillation(tuned, "student", steps=60, learning_rate=8e-3)
    result = fastkd.distill(tree, quiet=True)
    scores = {key: result.summary[key]["score"] for key in ("teacher", "before", "after")}
    assert scores["after"] > 0.7 > 0.4 > scores["before"], scores
    folder = str(tuned / "student" / "student")
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3
    assert tuple(model.config.id2label.values()) == LABELS
    rows = (tuned / "task" / "dev.jsonl").read_text().splitlines()
    tagger = pipeline("token-classification", model=folder, aggregation_strategy="none")
    hits, words = 0, 0
    for row in map(json.loads, rows):
        # the pipeline leaves O out
        said = {entity["index"] - 1: entity["entity"] for entity in tagger(" ".join(row["tokens"]))}
        hits += sum(said.get(n, "O") == tag for n, tag in enumerate(row["tags"]))
        words += len(row["tokens"])
    assert hits / words == pytest.approx(result.summary["after"]["scores"]["dev"]["token_accuracy"])
    evaluated = fastkd.evaluate(result)
    assert evaluated.judged["scores"] == result.summary["after"]["scores"]


def test_ranks_and_a_cached_teacher_change_nothing(tuned: Path) -> None:
    fastkd.distill(distillation(tuned, "whole"), quiet=True)
    cached = distillation(tuned, "cached")
    cached["teacher"]["cache"] = "exact"
    cached["teacher"]["cache_folder"] = str(tuned / "states")
    fastkd.distill(cached, quiet=True)
    recipe = tuned / "ranks.yaml"
    recipe.write_text(json.dumps(distillation(tuned, "ranks", micro_batch_size=4)))
    run_variants(recipe, [[]], ranks=2)
    for name in ("cached", "ranks"):
        assert_same_run(tuned / name, tuned / "whole", losses=1e-5, weights=1e-5)
    whole, ranks = (
        json.loads((tuned / name / "summary.json").read_text()) for name in ("whole", "ranks")
    )
    assert ranks["after"]["scores"] == whole["after"]["scores"]


WRONG = {
    "text": (
        {"task": None, "data": {"train": "x"}},
        "student.head is token_classification, whose labels a task has; give task in place of data",
    ),
    "no labels": ({"task": {"labels": None}}, "labels: missing; kind is token_classification"),
    "packed": ({"task": {"padding": "none"}}, "padding: none is for another kind of task"),
    "a score": ({"task": {"bounds": [0, 1]}}, "bounds is for another kind of task"),
    "another head": (
        {"student": {"head": "sequence_classification"}},
        "student.head is sequence_classification, but a task is learned by token_classification",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_refused(name: str, tmp_path: Path) -> None:
    changes, said = WRONG[name]
    tree = distillation(tmp_path, "run")
    for section, values in changes.items():
        tree[section] = None if values is None else {**tree.get(section, {}), **values}
        tree["student"]["head"] = tree["student"].get("head", "token_classification")
    with pytest.raises(UserError) as refused:
        parse_recipe(tree)
    assert said in str(refused.value)


def test_a_preset_for_labels_of_texts_takes_the_head_of_the_task(tmp_path: Path) -> None:
    tree = {**distillation(tmp_path, "run"), "preset": "pkd-skip"}
    del tree["losses"]
    assert parse_recipe(tree).student.head == "token_classification"


def test_a_teacher_of_texts_is_refused(tuned: Path) -> None:
    tree = distillation(tuned, "refused")
    tree["teacher"]["model"] = str(tuned / "encoder")
    with pytest.raises(UserError, match="its head was never trained, 2 weights are missing"):
        fastkd.distill(tree, quiet=True)
