"""Rows are what their files and the tokenizer say, in batches of whole rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_others import letter_tokenizer
from tiny_rows import COLUMNS, Row, random_rows, write_rows
from tiny_tasks import word_tokenizer
from transformers import PreTrainedTokenizerBase

from fastkd.data.batching import BatchPlan
from fastkd.data.rows import RowSets, RowSettings, prepare_rows, tokenized
from fastkd.data.rows.datamodule import RowDataModule
from fastkd.data.rows.read import sentences
from fastkd.data.text.settings import TextSettings
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.row_form import RowForm
from fastkd.types import ROWS, SCORES

FRACTION, LENGTH = 0.3, 16
FORM = RowForm(columns=COLUMNS, named=True)
GROUPS = RowForm(columns=("query", "passages"), named=True, candidates=2, scores=("scores",))


def prepared(
    path: Path,
    form: RowForm = FORM,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    token_types: bool = False,
    **settings: Any,
) -> RowSets:
    given = {
        "train": (str(path),),
        "documents": "row",
        "text_column": form.columns[0],
        "heldout_fraction": FRACTION,
        "block_size": LENGTH,
        "workers": 0,
        "cache": str(path.parent / "cache"),
    }
    text = TextSettings(**{**given, **settings})
    settings_of_rows = RowSettings(text=text, form=form, token_types=token_types)
    return prepare_rows(settings_of_rows, tokenizer or tiny_tokenizer(), progress=False)


def is_held_out(row: Row, first: str = "query") -> bool:
    digest = hashlib.blake2b(row[first].encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < FRACTION


def defined(rows: list[Row], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Ids of every sequence of every row, as the tokenizer alone makes them."""
    found = []
    for row in rows:
        texts = []
        for column in form.columns:
            listed = row[column] if isinstance(row[column], list) else [row[column]]
            texts += [form.prompts.get(column, "") + text for text in listed]
        pairs = [(texts[0], t) for t in texts[1:]] if form.paired else [(t,) for t in texts]
        for pair in pairs:
            made = tokenizer(*pair, truncation=True, max_length=LENGTH)
            found.append(made["input_ids"])
    tokenizer.backend_tokenizer.no_truncation()
    return found


FORMS = {
    "texts": FORM,
    "pairs": replace(FORM, paired=True, scores=("good", "bad")),
    "prompts": replace(FORM, prompts={"query": "w7 ", "negative": "w8 w9 "}),
    "single": replace(FORM, columns=("query",)),
    "groups": GROUPS,
    "paired-groups": replace(GROUPS, paired=True, prompts={"passages": "w9 "}),
}
# cells of CSV and TSV hold no lists
NAMED = [
    (name, form)
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved")
    for form, given in FORMS.items()
    if name[-3:] not in ("csv", "tsv") or given.candidates is None
]


@pytest.mark.parametrize(("name", "kind"), NAMED)
def test_rows_are_what_the_file_says(name: str, kind: str, tmp_path: Path) -> None:
    form = FORMS[kind]
    rows, tokenizer = random_rows(), tiny_tokenizer()
    sets = prepared(write_rows(tmp_path / name, rows), form)
    for part, held_out in ((sets.train, False), (sets.heldout, True)):
        own = [row for row in rows if is_held_out(row) == held_out]
        expected = defined(own, form, tokenizer)
        assert 0 < len(part) == len(own)
        assert len(expected) == len(own) * len(form.sequences)
        batch = part.batch(range(len(own)), multiple=1)
        for ids, mask, wanted in zip(
            batch["input_ids"], batch["attention_mask"].bool(), expected, strict=True
        ):
            assert ids[mask].tolist() == wanted
        lengths = np.reshape([len(ids) for ids in expected], (len(own), -1)).max(axis=1)
        assert part.lengths.tolist() == lengths.tolist()
        if form.scores:
            assert batch[SCORES].dtype == torch.float32
            wanted = torch.tensor([row["scores"] for row in own])
            assert torch.equal(batch[SCORES], wanted)
        else:
            assert SCORES not in batch


def test_pairs_are_told_apart_by_types(tmp_path: Path) -> None:
    rows = [{"a": "the dog runs", "b": f"a cat sees {n}", "c": "not"} for n in ("5", "fish")]
    form = RowForm(columns=("a", "b", "c"), named=True, paired=True)
    tokenizer = word_tokenizer()
    held_out = write_rows(tmp_path / "b.jsonl", [{"a": "red", "b": "green", "c": "blue"}])
    train = write_rows(tmp_path / "a.jsonl", rows)
    types = {"tokenizer": tokenizer, "token_types": True}
    sets = prepared(train, form, heldout=(str(held_out),), **types)
    batch = sets.train.batch([1, 0], multiple=1)
    first = [rows[1]["a"]] * 2 + [rows[0]["a"]] * 2
    second = [rows[1]["b"], rows[1]["c"], rows[0]["b"], rows[0]["c"]]
    expected = tokenizer(
        first, second, padding=True, return_tensors="pt", return_token_type_ids=True
    )
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_a_default_prompt_stands_before_what_has_none() -> None:
    form = RowForm(columns=("a", "b", "c"), prompts={"b": "w9 ", "c": ""})
    assert form.with_default("w5 ").prompt_of == ("w5 ", "w9 ", "")
    assert RowForm(columns=("a", "b")).with_default("w5 ").prompt_of == ("w5 ", "w5 ")
    # of a pair the library puts it before the first text alone
    pair = RowForm(columns=("a", "b"), paired=True)
    assert pair.with_default("w5 ").prompt_of == ("w5 ", "")


def test_lines_of_plain_text_are_rows(tmp_path: Path) -> None:
    lines = [row["query"] for row in random_rows()]
    (tmp_path / "a.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    form = RowForm(prompts={"text": "w9 "})
    sets = prepared(tmp_path / "a.txt", form)
    kept = [{"text": line} for line in lines if not is_held_out({"text": line}, "text")]
    ids = defined(kept, form, tiny_tokenizer())
    batch = sets.train.batch(range(len(sets.train)), multiple=1)
    found = [i[m.bool()].tolist() for i, m in zip(*list(batch.values())[:2], strict=True)]
    assert found == ids


SENTENCES = [
    ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
    ("Dr. Smith came at 5 p.m. on Monday! It rained.", ["Dr. Smith came at 5 p.m. on Monday!"]),
    ("One line\nand the next. A second\nline here.", ["One line and the next."]),
    ("It is 3.5 m (11 feet.) 4 people saw it", ["It is 3.5 m (11 feet.)", "4 people saw it"]),
    ("no end and no capital. at all", ["no end and no capital. at all"]),
    ("Why? Because it rained.", ["Why? Because it rained."]),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences_end_where_the_next_one_begins(text: str, expected: list[str]) -> None:
    found = list(sentences(text))
    assert found[: len(expected)] == expected and len(found) <= 2
    assert " ".join(found) == " ".join(text.split())


@pytest.mark.parametrize("plain", [True, False])
def test_sentences_of_documents_are_rows(plain: bool, tmp_path: Path) -> None:
    texts = [f"W{n} w1 w2 w3. W4 w5 w{n}\nw6 w7. W8 w9 w{n} w10" for n in range(5, 25)]
    path = tmp_path / ("a.txt" if plain else "a.jsonl")
    rows = "\n\n".join(texts) if plain else "\n".join(json.dumps({"text": t}) for t in texts)
    path.write_text(rows + "\n")
    made = prepared(path, RowForm(sentences=True), documents="sentence", block_size=64)
    each = [sentence for text in texts for sentence in sentences(text)]
    held = sum(is_held_out({"text": sentence}, "text") for sentence in each)
    assert len(each) == 60 and 0 < held < 60
    assert (len(made.train), len(made.heldout)) == (60 - held, held)


def test_rows_are_made_once_and_cuts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = random_rows()
    path = write_rows(tmp_path / "a.jsonl", rows)
    first = prepared(path)
    long = sum(len(row[column].split()) > LENGTH - 2 for row in rows for column in COLUMNS)
    said = f"{long} of {3 * len(rows)} sequences are longer than {LENGTH} tokens and were cut"
    assert said in caplog.text

    single = replace(FORM, columns=("query",))
    prepared(path, single)
    # what is held out by name is the same whatever is trained on
    held_out = (str(write_rows(tmp_path / "b.jsonl", rows[:9])),)
    apart = prepared(path, heldout=held_out)
    other = prepared(write_rows(tmp_path / "c.jsonl", rows[9:]), heldout=held_out)
    assert apart.heldout.fingerprint == other.heldout.fingerprint != first.heldout.fingerprint
    assert apart.train.fingerprint != other.train.fingerprint

    def never(*_: object) -> None:
        raise AssertionError("rows were tokenised again")

    monkeypatch.setattr(tokenized, "tokenise", never)
    again = prepared(path)
    assert again.train.fingerprint == first.train.fingerprint
    assert isinstance(again.train.sequences.tokens, np.memmap)
    prepared(path, heldout=held_out, heldout_fraction=FRACTION / 2)
    # whatever changes the rows, or who reads them, makes them again
    for form, changes in (
        (replace(FORM, prompts={"query": "w7 "}), {}),
        (replace(FORM, paired=True), {}),
        (replace(FORM, columns=COLUMNS[:2]), {}),
        (replace(FORM, scores=("good", "bad")), {}),
        (replace(single, sentences=True), {"documents": "sentence"}),
        (FORM, {"block_size": LENGTH - 1}),
        (FORM, {"heldout_fraction": FRACTION / 2}),
        (FORM, {"token_types": True}),
        (FORM, {"tokenizer": tiny_tokenizer(32)}),
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            prepared(path, form, **changes)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_rows_that_change_while_they_are_read_are_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows()
    train = write_rows(tmp_path / "a.jsonl", rows)
    heldout = write_rows(tmp_path / "b.jsonl", random_rows(20, seed=1))
    encode = tokenized.RowEncoder.batch

    def rewritten(encoder: tokenized.RowEncoder, parts: Any) -> Any:
        write_rows(tmp_path / ("a.jsonl" if part == "train" else "b.jsonl"), rows[:9])
        return encode(encoder, parts)

    monkeypatch.setattr(tokenized.RowEncoder, "batch", rewritten)
    with pytest.raises(UserError, match="it changed while it was read"):
        prepared(train, heldout=(str(heldout),))
    assert not [*(tmp_path / "cache").iterdir()]


@pytest.mark.parametrize("saved", [False, True], ids=["file", "data set of another split"])
def test_rows_held_out_by_name_are_not_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saved: bool
) -> None:
    rows, held_out = random_rows(), tmp_path / "b.csv"
    if saved:
        datasets.Dataset.from_list(rows[:7], split="validation").save_to_disk(held_out)
    else:
        write_rows(held_out, rows[:7])
    with caplog.at_level(logging.WARNING):
        sets = prepared(write_rows(tmp_path / "a.jsonl", rows), heldout=(str(held_out),))
    assert (len(sets.train), len(sets.heldout)) == (53, 7)
    assert "7 rows to train on are also held out" in caplog.text


def test_processes_make_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", random_rows(120))
    one = prepared(path)
    monkeypatch.setattr("fastkd.data.text.tokenize.BATCH_CHARACTERS", 500)
    two = prepared(path, workers=2, cache=str(tmp_path / "other"))
    for mine, theirs in zip(one, two, strict=True):
        assert np.array_equal(mine.sequences.tokens, theirs.sequences.tokens)
        assert np.array_equal(mine.sequences.offsets, theirs.sequences.offsets)


CUTS = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("counts_padding", [False, True])
def test_steps_are_cut_between_rows(counts_padding: bool, tmp_path: Path) -> None:
    sets = prepared(write_rows(tmp_path / "a.jsonl", random_rows()), GROUPS)
    data = RowDataModule(sets, 10, None, counts_padding)
    whole = _steps(data, BatchPlan(8, 1, 1), 0)
    for cut in CUTS:
        plan = BatchPlan(*cut)
        ranks = [_steps(data, plan, rank) for rank in range(plan.world_size)]
        for number, (expected,) in enumerate(whole):
            # ranks take micro-batches in turn
            turns = zip(*(steps[number] for steps in ranks), strict=True)
            parts = [part for turn in turns for part in turn]
            assert all(len(part["input_ids"]) == 3 * plan.micro_batch_size for part in parts)
            assert torch.equal(torch.cat([p[SCORES] for p in parts]), expected[SCORES])
            assert torch.equal(torch.cat([p[ROWS] for p in parts]), expected[ROWS])
            assert _contents(parts) == _contents([expected])
            widths = {part["input_ids"].shape[1] for part in parts}
            assert not counts_padding or widths == {expected["input_ids"].shape[1]}
    numbers = torch.cat([step[0][ROWS] for step in whole[: len(sets.train) // 8]])
    assert len(set(numbers.tolist())) == len(numbers)
    assert (numbers.reshape(-1, 3) % 3 == torch.arange(3)).all()


def _steps(data: RowDataModule, plan: BatchPlan, rank: int) -> list[Any]:
    micro_batches = data.micro_batches(8, 3, plan, rank)
    return [micro_batches.next_step(step) for step in range(12)]


def _contents(parts: list[Any]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for part in parts
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("counts_padding", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_micro_batches_hold_as_many_rows_as_tokens_allow(
    world: int, counts_padding: bool, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", random_rows(200, longest=28))
    form, budget = replace(FORM, columns=("query", "positive")), 128
    sets = prepared(path, form, block_size=32)
    data = RowDataModule(sets, 10, None, counts_padding)
    whole = _steps(data, BatchPlan(8, 1, 1), 0)
    plan = BatchPlan(1, 8 // world, world, tokens=budget)
    ranks = [_steps(data, plan, rank) for rank in range(world)]
    sizes = set()
    for number, (expected,) in enumerate(whole):
        turns = list(zip(*(steps[number] for steps in ranks), strict=True))
        parts = [part for turn in turns for part in turn]
        assert torch.equal(torch.cat([p[ROWS] for p in parts]), expected[ROWS])
        assert _contents(parts) == _contents([expected])
        for turn in turns:
            (count,) = {len(part["input_ids"]) for part in turn}
            assert max(part["input_ids"].numel() for part in turn) <= budget
            sizes.add(count // 2)
        for turn, following in itertools.pairwise(turns):
            # the next rows in length, one on each rank, would have been too many
            nearest = max(part["input_ids"].shape[1] for part in following)
            if len(following[0]["input_ids"]) == 2:
                assert (len(turn[0]["input_ids"]) + 2) * nearest > budget
    assert len(sizes) > 1 or counts_padding or world == 4


def test_a_feed_goes_on_where_it_stood(tmp_path: Path) -> None:
    sets = prepared(write_rows(tmp_path / "a.jsonl", random_rows()))
    data, plan = RowDataModule(sets, 10), BatchPlan(1, 4, 2, tokens=96)
    whole = _steps(data, plan, 1)
    first = data.micro_batches(8, 3, plan, 1)
    for step in range(7):
        first.next_step(step)
    second = data.micro_batches(8, 3, plan, 1)
    second.load_state_dict(first.state_dict())
    assert second.epoch == first.epoch > 0
    for step in range(7, 12):
        for found, expected in zip(second.next_step(step), whole[step], strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_rank_reads_as_many_heldout_parts(tmp_path: Path) -> None:
    sets = prepared(write_rows(tmp_path / "a.jsonl", random_rows()), GROUPS)
    data = RowDataModule(sets, 11)
    seen: list[int] = []
    counts, read = set(), []
    for rank in range(3):
        parts = list(data.heldout(2, Ranks(rank, 3, torch.device("cpu"))))
        counts.add(len(parts))
        seen += [number for part in parts for number in part.rows.tolist()]
        read += _contents([part.inputs for part in parts])
        assert all(len(part.inputs["input_ids"]) >= 3 * len(part.rows) for part in parts)
    assert len(counts) == 1
    assert sorted(seen) == list(range(11))
    # spread over all that is held out
    ends = sets.heldout.batch([0, len(sets.heldout) - 1])
    assert all(ids in read for ids in _contents([ends]))


def test_a_teacher_reads_the_same_texts_by_its_own_tokenizer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", random_rows())
    small = tiny_tokenizer(32)
    sets = prepared(path, GROUPS).with_teacher(prepared(path, GROUPS, tokenizer=small))
    batch = sets.train.batch([2, 0])
    kept = [row for row in random_rows() if not is_held_out(row)]
    expected = defined([kept[2], kept[0]], GROUPS, small)
    ids, mask = batch["teacher.input_ids"], batch["teacher.attention_mask"].bool()
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == expected
    assert batch["input_ids"].shape[0] == ids.shape[0] == 6
    alone = prepared(path, GROUPS)
    read = alone.train.batch([2, 0])
    assert all(torch.equal(batch[name], read[name]) for name in read)
    letters = prepared(path, GROUPS, tokenizer=letter_tokenizer(), block_size=64)
    sets = alone.with_teacher(letters)
    # batches are made, and budgets of tokens kept, by the longer of the two
    lengths = np.maximum(alone.train.lengths, letters.train.lengths)
    assert sets.train.lengths.tolist() == lengths.tolist() != alone.train.lengths.tolist()
    for name in ("train", "heldout"):
        made, *parts = (getattr(each, name).fingerprint for each in (sets, alone, letters))
        assert all(part in made for part in parts)


GOOD = {"query": "w5", "passages": ["w6", "w7"], "scores": [1, 2.5], "good": 1, "bad": 2}
BROKEN = {
    "missing": (
        {"query": None, "passage": "w6"},
        "no column 'passages'; it has 'query', 'passage': set data.columns or data.scores to some",
    ),
    "null": ({**GOOD, "query": None}, "column 'query' holds null, expected text"),
    "empty": ({**GOOD, "query": " "}, "column 'query' is empty, expected text"),
    "none": ({**GOOD, "passages": []}, "'passages' holds no texts, expected a list of 2 texts"),
    "more": ({**GOOD, "passages": ["w5"] * 3}, "'passages' holds 3 texts, expected a list of 2"),
    "text": ({**GOOD, "passages": "w5 w6"}, "'passages' holds str, expected a list of 2 texts"),
    "inside": ({**GOOD, "passages": ["w5", 3]}, r"'passages\[1\]' holds int, expected text"),
    "hollow": ({**GOOD, "passages": ["", "w5"]}, r"'passages\[0\]' is empty, expected text"),
    "fewer": ({**GOOD, "scores": [1]}, "'scores' holds 1 scores, expected a list of 2 scores"),
    "nan": ({**GOOD, "scores": [1, float("nan")]}, r"'scores\[1\]' holds nan, expected a finite"),
    "large": ({**GOOD, "scores": [1, -1e39]}, r"'scores\[1\]' holds -1e\+39, .* at most 3.4"),
    "switch": ({**GOOD, "scores": [True, 1]}, r"'scores\[0\]' holds True, expected a finite"),
    "word": ({**GOOD, "scores": [1, "best"]}, r"'scores\[1\]' holds 'best', expected a finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused_with_their_line(case: str, tmp_path: Path) -> None:
    row, message = BROKEN[case]
    path = write_rows(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{message}"):
        prepared(path, GROUPS)


FILES = {
    "cells": ("a.csv", "query,b\nw5,w6\nw7\n", r"csv, line 3: 1 cells, expected 2 split by comma"),
    "quotes": ("a.csv", 'query,b\n"w5" w6,w7\n', r"a\.csv, line 2: not CSV"),
    "open": ("a.csv", 'query,b\nw5,w6\n"w7,w8\n', r"a\.csv, line 3: not CSV"),
    "twice": ("a.csv", "query,query\nw5,w6\n", r"a\.csv, line 1: column 'query' stands twice"),
    "column": ("a.tsv", "quer\tb\nw5\tw6\n", r"tsv, line 1: no column 'query'; it has 'quer', 'b'"),
    "tabs": ("a.tsv", "query\tb\nw5\tw6\tw7\n", r"tsv, line 2: 3 cells, expected 2 split by TAB"),
    "score": ("a.csv", "query,b,s\nw5,w6,inf\n", r"line 2: column 's' holds 'inf', expected a fin"),
    "score 1_0": ("a.csv", "query,b,s\nw5,w6,1_0\n", r"line 2: column 's' holds '1_0', expected a"),
    "commas": ("a.csv", "query,b\nw5,w6\n,\n", r"csv, line 3: column 'query' is empty, expected"),
    "empty": ("a.tsv", "query\tb\nw5\tw6\n\t\n", r"tsv, line 3: column 'query' is empty, expected"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused_with_their_line(case: str, tmp_path: Path) -> None:
    name, content, message = FILES[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    scores = ("s",) if case.startswith("score") else ()
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / name, RowForm(columns=("query", "b"), named=True, scores=scores))


def test_cells_hold_line_ends_and_quotes(tmp_path: Path) -> None:
    content = 'a,query\r\n1,"w5\nw6, ""w7"""\r\n\r\n2,w8\r\n3,w9\r\n4,w10\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    other = write_rows(tmp_path / "b.jsonl", [{"query": "w11"}])
    sets = prepared(
        tmp_path / "a.csv", RowForm(columns=("query",), named=True), heldout=(str(other),)
    )
    unknown = 1
    assert _contents([sets.train.batch(range(4))])[:2] == [
        [2, 5, 6, unknown, unknown, 7, unknown, 3],
        [2, 8, 3],
    ]


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5\nw6\n")
    with pytest.raises(UserError, match=r"data.columns is given, but .*a\.txt is plain text"):
        prepared(tmp_path / "a.txt", RowForm(named=True))


def test_no_rows_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query\n")
    with pytest.raises(UserError, match=r"data.train: .*a\.csv: no rows in it"):
        prepared(tmp_path / "a.csv", RowForm(columns=("query",), named=True))
    (tmp_path / "b.csv").write_text("query\nw5\n")
    with pytest.raises(UserError, match=r"no row is (held out|to train on) where data.heldout_fra"):
        prepared(tmp_path / "b.csv", RowForm(columns=("query",), named=True))
    with pytest.raises(UserError, match=r"data.train: .*a\.csv: no rows in it"):
        heldout = (str(tmp_path / "b.csv"),)
        prepared(tmp_path / "a.csv", RowForm(columns=("query",), named=True), heldout=heldout)


def test_too_few_first_texts_to_split_by_are_counted(tmp_path: Path) -> None:
    genres = [f"genre {number}" for number in range(9)]
    kept = [genre for genre in genres if not is_held_out({"query": genre})][:2]
    rows = [{**row, "genre": kept[n % 2]} for n, row in enumerate(random_rows(60))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    said = (
        r"no row is held out where data.heldout_fraction is 0.3: rows are split by the first of "
        r"data.columns, 'genre', with 2 different in 60 rows; give more rows that differ in it, "
        r"another first column, another fraction, or data.heldout"
    )
    with pytest.raises(UserError, match=said):
        prepared(path, RowForm(columns=("genre", "query"), named=True))
    with pytest.raises(UserError, match="split by their text, with 2 different in 60 rows; give m"):
        prepared(path, RowForm(columns=("genre",), named=True))
