"""Training examples that recipes are chosen by: which they are, and who reads them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import read_weights
from tiny_tasks import PAIRS, masked_model, word_tokenizer
from tiny_training import save_encoder, task_section, write_recipe, write_task

import fastkd
from fastkd.data.factory import make_datamodule
from fastkd.data.tasks import Examples, read_examples
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.selection import first_of, split_off
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.recipe import parse_finetune_recipe

SHARE = 0.3
RANKS = Ranks(device=torch.device("cpu"), rank=0, world_size=1)


def is_chosen(text: str, share: float = SHARE) -> bool:
    """The definition."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def pairs(count: int = 200) -> Examples:
    """Pairs of which three share their first text, and one in two its second."""
    texts = [(f"premise {n // 3}", f"hypothesis {n % 2}") for n in range(count)]
    return Examples("pairs train", texts, np.arange(count) % 2)


def test_the_first_text_alone_decides() -> None:
    examples = pairs()
    rest, part = split_off(examples, SHARE)
    chosen = [is_chosen(first) for first, _ in examples.texts]
    rows = list(examples)
    assert list(part) == [row for row, taken in zip(rows, chosen, strict=True) if taken]
    assert list(rest) == [row for row, taken in zip(rows, chosen, strict=True) if not taken]
    assert 0.2 < len(part) / len(examples) < 0.4
    assert not {first for first, _ in rest.texts} & {first for first, _ in part.texts}
    assert len({examples.digest, rest.digest, part.digest}) == 3
    # a larger share holds a smaller one
    larger = split_off(examples, 2 * SHARE)[1]
    assert set(part.texts) < set(larger.texts)


def test_neither_order_nor_form_of_the_files_decides(tmp_path: Path) -> None:
    lines = [f"{a}\t{b}\t{('no', 'yes')[label]}" for (a, b), label in pairs()]
    random.Random(0).shuffle(lines)
    (tmp_path / "train.csv").write_text("\n".join(["a,b,y", *lines]).replace("\t", ",") + "\n")
    there = read_examples(PAIRS, tmp_path, "train", tmp_path)
    for found, expected in zip(split_off(there, SHARE), split_off(pairs(), SHARE), strict=True):
        assert sorted(found) == sorted(expected)


def test_some_are_the_same_whatever_the_order_and_more_hold_fewer() -> None:
    examples = pairs()
    mixed = list(range(len(examples)))
    random.Random(0).shuffle(mixed)
    other = Examples(examples.name, [examples.texts[n] for n in mixed], examples.labels[mixed])
    some = first_of(examples, 20)
    assert len(some) == 20 and sorted(some) == sorted(first_of(other, 20))
    assert set(some.texts) < set(first_of(examples, 50).texts)
    # in the order of the file
    assert [row for row in examples if row in list(some)] == list(some)
    assert list(first_of(examples, 1000)) == list(examples)
    with pytest.raises(UserError, match=r"task\.examples is 1, which takes 1 of .* one label"):
        first_of(examples, 1)


def test_scores_stay_scores() -> None:
    labels = np.linspace(0, 5, 50, dtype=np.float32)
    for part in split_off(Examples("s", [(f"text {n}",) for n in range(50)], labels), SHARE):
        assert part.regression and part.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("share", "labels", "said"),
    [
        (1e-9, (0, 1), "takes 0 of 200 examples of t, so there is nothing to score; give a larger"),
        (1 - 1e-9, (0, 1), "takes all 200 examples of t, so there are none to train on; give a sm"),
        (0.3, (1, 1), "takes 62 of 200 examples of t, that all have one label; give a larger"),
    ],
)
def test_parts_of_no_use_are_refused(share: float, labels: tuple[int, int], said: str) -> None:
    given = np.array(labels * 100)
    examples = Examples("t", [(f"text {n}",) for n in range(200)], given)
    with pytest.raises(UserError) as refused:
        split_off(examples, share)
    assert f"task.selection.share is {share:g}, which {said}" in str(refused.value)
    assert "\n" not in str(refused.value)


WORDS = {"kind": "token_classification", "labels": ["O", "B-X"], "columns": None}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"selection": {"share": 1.0}}, "task.selection.share: input should be less than 1"),
        ({"selection": {"share": 0}}, "task.selection.share: input should be greater than 0"),
        ({"selection": 0.1}, "task.selection: expected a section with keys share, scored"),
        ({"selection": {"scored": False}}, "task.selection.share: missing"),
        (
            {"selection": {"share": 0.1}, "evaluate": ["dev", "more"]},
            "task: evaluate is dev, more, but selection.scored is true, so nothing else is scored",
        ),
        ({"selection": {"share": 0.1}, **WORDS}, "task: selection is for another kind of task"),
    ],
)
def test_what_does_not_go_together_is_refused(task: dict[str, Any], said: str) -> None:
    tree = {"model": "x", "run": {"output": "x"}, "task": {**task_section(Path("x")), **task}}
    with pytest.raises(UserError) as refused:
        parse_finetune_recipe(tree)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("selection")
    write_task(made / "task")
    save_encoder(made / "encoder")
    return made


def tuned(folder: Path, name: str, **task: Any) -> fastkd.RunResult:
    path = write_recipe(folder, f"tuned-{name}", task=task, train={"steps": 3})
    return fastkd.finetune(path, quiet=True)


@pytest.fixture(scope="module")
def chosen(folder: Path) -> fastkd.RunResult:
    """Scored on the part of the training examples that it was not trained on; there is no dev."""
    dev = folder / "task" / "dev.tsv"
    dev.rename(folder / "away.tsv")
    try:
        return tuned(folder, "chosen", selection={"share": SHARE})
    finally:
        (folder / "away.tsv").rename(dev)


def rows_of(folder: Path, *, taken: bool) -> list[list[str]]:
    rows = [row.split("\t") for row in (folder / "task" / "train.tsv").read_text().splitlines()[1:]]
    return [row for row in rows if is_chosen(row[0]) == taken]


def test_a_run_is_scored_on_what_it_was_not_trained_on(
    folder: Path, chosen: fastkd.RunResult
) -> None:
    part, rest = rows_of(folder, taken=True), rows_of(folder, taken=False)
    summary = chosen.summary
    assert summary["task_examples"] == len(rest) and summary["after"]["examples"] == len(part)
    model, tokenizer = chosen.student, chosen.tokenizer
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits for text, _ in part]
    said = torch.cat(logits).argmax(dim=1)
    right = [("no", "yes")[one] == label for one, (_, label) in zip(said, part, strict=True)]
    expected = {"selection": {"accuracy": pytest.approx(sum(right) / len(part))}}
    assert summary["after"]["scores"] == expected


def test_the_last_run_trains_on_the_same_rest_and_is_scored_on_dev(
    folder: Path, chosen: fastkd.RunResult
) -> None:
    last = tuned(folder, "last", selection={"share": SHARE, "scored": False})
    assert last.summary["after"]["scores"].keys() == {"dev"}
    mine, theirs = read_weights(last.folder), read_weights(chosen.folder)
    assert all(mine[name].equal(weight) for name, weight in theirs.items())
    digests = chosen.summary["data_digests"]
    assert last.summary["data_digests"]["train"] == digests["train"] != digests["selection"]
    # as if the file had held nothing else
    rest = ["text\tlabel", *("\t".join(row) for row in rows_of(folder, taken=False))]
    (folder / "task" / "rest.tsv").write_text("\n".join(rest) + "\n")
    alone = tuned(folder, "alone", train="rest")
    assert alone.summary["data_digests"]["train"] == digests["train"]


def test_an_evaluation_may_turn_to_dev_but_not_to_what_was_trained_on(
    folder: Path, chosen: fastkd.RunResult
) -> None:
    again = fastkd.evaluate(chosen, quiet=True).judged
    assert again["scores"] == chosen.summary["after"]["scores"]
    # a part of what was kept out is as unseen as all of it
    fewer = fastkd.evaluate(chosen, {"task.selection.share": SHARE / 2}, quiet=True).judged
    assert 0 < fewer["examples"] < again["examples"]
    for given in ({"task.selection.scored": False}, {"task.selection": None}):
        found = fastkd.evaluate(chosen, given, quiet=True).judged
        assert found["scores"].keys() == {"dev"} and found["examples"] == 40
    with pytest.raises(UserError, match=r"share is 0\.5, but the run kept 0\.3 of its"):
        fastkd.evaluate(chosen, {"task.selection.share": 0.5}, quiet=True)


def test_copies_are_made_of_what_is_trained_on(tmp_path: Path) -> None:
    # of every example one word is its own, and one is replaced
    words = [f"word{n}" for n in range(60)]
    (tmp_path / "task").mkdir()
    rows = [f"the dog {word}\t{('no', 'yes')[n % 2]}" for n, word in enumerate(words)]
    for split in ("train", "dev"):
        (tmp_path / "task" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (tmp_path / "near.tsv").write_text("dog\tcat\ndog\tbird\n")
    near = {"source": "neighbours", "synonyms": str(tmp_path / "near.tsv"), "probability": 1}
    section = {"augmentation": near, "selection": {"share": SHARE}}
    task = {**task_section(tmp_path), **section}
    recipe = parse_finetune_recipe({"model": "x", "task": task, "run": {"output": "x"}})
    tokenizer = word_tokenizer(["the", "dog", "cat", "bird", *words])
    made = make_datamodule(recipe, tokenizer, masked_model().config, RANKS, progress=False)
    assert isinstance(made, TaskDataModule)
    rest = {word for word in words if not is_chosen(f"the dog {word}")}
    read = [tokenizer.convert_ids_to_tokens(int(token)) for token in made.train.tokens]
    assert {word for word in read if word in words} == rest
    assert {"cat", "bird"} <= set(read) and len(made.train) > len(rest)
    assert len(made.evaluations["selection"]) == len(words) - len(rest)
