"""Batches by length: every example once an epoch, however they are cut, exact after a stop."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_tasks import encoded

from fastkd.data.batching import BatchPlan
from fastkd.data.sampler import ExampleStream, cut, evaluation_parts
from fastkd.data.tasks import Columns, Task
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.types import ROWS

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SIZES = st.integers(1, 17)
SEEDS = st.integers(0, 99)


def rows_of(stream: ExampleStream, batches: int) -> list[list[int]]:
    return [stream.next_rows() for _ in range(batches)]


@given(lengths=LENGTHS, size=SIZES, seed=SEEDS, epochs=st.integers(1, 4))
def test_every_example_once_an_epoch(lengths: list[int], size: int, seed: int, epochs: int) -> None:
    """A batch may reach into the next epoch, so whole epochs are counted where they end."""
    stream = ExampleStream(encoded(lengths), size, seed)
    # an epoch that ends inside a batch is seen by the position, not by the sorted rows
    seen: Counter[int] = Counter()
    while sum(seen.values()) < epochs * len(lengths):
        batch = stream.next_rows()
        assert len(batch) == size
        seen.update(batch)
        full, over = divmod(sum(seen.values()), len(lengths))
        # after so many whole epochs and a part of one, counts differ by one at most
        assert set(seen[row] for row in range(len(lengths))) <= {full, full + bool(over)}


@given(lengths=LENGTHS, size=SIZES, seed=SEEDS, before=st.integers(0, 30))
def test_continues_exactly(lengths: list[int], size: int, seed: int, before: int) -> None:
    stream = ExampleStream(encoded(lengths), size, seed)
    rows_of(stream, before)
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = rows_of(stream, 12)

    fresh = ExampleStream(encoded(lengths), size, seed)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert rows_of(fresh, 12) == expected
    # and a stream that has moved on comes back
    stream.load_state_dict(state)
    assert rows_of(stream, 12) == expected


@given(
    lengths=LENGTHS,
    size=st.integers(1, 3),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=SEEDS,
    multiple=st.sampled_from([1, 4, 8]),
)
def test_cutting_changes_nothing_but_padding(
    lengths: list[int], size: int, world: int, accumulation: int, seed: int, multiple: int
) -> None:
    total = size * world * accumulation
    examples = encoded(lengths, 41)
    rows = ExampleStream(examples, total, seed).next_rows()
    batch, plan = examples.batch(rows, multiple), BatchPlan(size, accumulation, world)
    parts = [
        [examples.batch(part, multiple) for part in cut(rows, plan, rank)] for rank in range(world)
    ]
    assert all(len(part) == accumulation for part in parts)
    flat = [micro for part in parts for micro in part]
    assert all(len(micro["labels"]) == size for micro in flat)
    assert sorted(contents(flat)) == sorted(contents([batch]))
    for micro in flat:
        longest = int(micro["attention_mask"].sum(dim=1).max())
        width = micro["input_ids"].shape[1]
        assert longest <= width < longest + multiple
        assert width % multiple == 0 or width == 41
    # ranks work on neighbours in length at any time
    for number in range(accumulation - 1):
        now = max(int(part[number]["attention_mask"].sum(1).max()) for part in parts)
        later = min(int(part[number + 1]["attention_mask"].sum(1).min()) for part in parts)
        assert now <= later


def contents(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    """Label and valid ids of every row."""
    return [
        (int(batch["labels"][row]), *batch["input_ids"][row][mask.bool()].tolist())
        for batch in batches
        for row, mask in enumerate(batch["attention_mask"])
    ]


def test_batches_hold_their_examples() -> None:
    lengths = [5, 3, 12, 7]
    batch = encoded(lengths).batch([2, 0, 1])
    assert batch["input_ids"].shape == (3, 16)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["labels"].tolist() == [2, 0, 1]
    for row, number in enumerate([2, 0, 1]):
        valid = [number + 1] * lengths[number]
        padding = [0] * (16 - lengths[number])
        assert batch["input_ids"][row].tolist() == valid + padding
        assert batch["attention_mask"][row].tolist() == [1] * len(valid) + padding
    assert "token_type_ids" not in batch
    assert encoded(lengths, 13).batch([2])["input_ids"].shape == (1, 13)
    assert encoded(lengths).batch([0], multiple=1)["input_ids"].shape == (1, 5)


def test_the_seed_and_the_epoch_decide_the_order() -> None:
    examples = encoded([1 + i % 30 for i in range(200)])
    first = rows_of(ExampleStream(examples, 10, 0), 40)
    assert rows_of(ExampleStream(examples, 10, 0), 40) == first
    assert rows_of(ExampleStream(examples, 10, 1), 40) != first
    assert first[:20] != first[20:]
    # it is not the batches alone that are shuffled: an example meets others
    assert len({frozenset(batch) for batch in first}) == 40


def test_lengths_are_shuffled_over_an_epoch_and_similar_within_a_batch() -> None:
    """Also in later epochs, which start inside a batch."""
    # 125 batches and 8 examples
    lengths = np.random.default_rng(0).integers(5, 64, 4008).tolist()
    examples = encoded(lengths)
    stream = ExampleStream(examples, 32, 0)
    for _ in range(2):
        batches = [examples.batch(stream.next_rows(), 1) for _ in range(125)]
        assert np.mean([share(batch) for batch in batches]) > 0.95
        means = [float(batch["attention_mask"].sum(1).float().mean()) for batch in batches]
        # neither the whole epoch nor a part of it goes from short to long
        assert abs(np.corrcoef(np.arange(125), means)[0, 1]) < 0.25
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25
    plain = [examples.batch(list(range(at, at + 32)), 1) for at in range(0, 3200, 32)]
    assert np.mean([share(batch) for batch in plain]) < 0.62


def share(batch: dict[str, torch.Tensor]) -> float:
    """Of a batch that is no padding."""
    return float(batch["attention_mask"].float().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "its data order has seed 3, this run 4"),
        ({"batch_size": 5}, "its data order has batch_size 8, this run 5"),
    ],
)
def test_position_of_another_run_is_refused(changes: dict[str, Any], message: str) -> None:
    examples = encoded([3, 4, 5])
    state = ExampleStream(examples, 8, 3).state_dict()
    other = ExampleStream(examples, **{"batch_size": 8, "seed": 3, **changes})
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)
    with pytest.raises(UserError, match="its data order has fingerprint 'other'"):
        ExampleStream(examples, 8, 3).load_state_dict({**state, "fingerprint": "other"})


@pytest.mark.parametrize("counts_padding", [False, True])
def test_examples_of_every_set_have_a_number_of_their_own_behind_those_to_train_on(
    counts_padding: bool,
) -> None:
    """By which states of a teacher are stored and found again."""
    lengths = [6] * 7, [5, 9, 3], [12, 4]
    train, one, other = map(encoded, lengths)
    task = Task(name="tiny", columns=Columns(texts=("a",), label="b"), labels=("x", "y"))
    data = TaskDataModule(task, train, {"one": one, "other": other}, counts_padding)
    stored = torch.from_numpy(np.diff(data.stored_rows(heldout=True)))
    assert stored.tolist() == [*lengths[0], *lengths[1], *lengths[2]]
    assert np.diff(data.stored_rows(heldout=False)).tolist() == lengths[0]
    counted: list[int] = []
    for part in data.heldout(2, Ranks(0, 1, torch.device("cpu"))):
        numbers, mask = part.inputs[ROWS], part.inputs["attention_mask"]
        assert mask.sum(dim=1).tolist() == stored[numbers].tolist()
        assert numbers[: len(part.rows)].tolist() == (part.rows + len(train)).tolist()
        counted += part.rows.tolist()
        assert mask.shape[1] == 64 or not counts_padding
    assert sorted(counted) == [*range(5)]
    turned = replace(data, task=replace(task, labels=("y", "x")))
    identities = [data.cache_identity(heldout=heldout) for heldout in (False, True)]
    assert turned.cache_identity(heldout=True) not in identities
    assert [len(identity["data"]) for identity in identities] == [1, 3]


@given(lengths=LENGTHS, size=SIZES, world=st.integers(1, 4), together=st.integers(1, 4))
def test_evaluation_counts_every_example_once_on_equally_many_batches(
    lengths: list[int], size: int, world: int, together: int
) -> None:
    examples = encoded(lengths)
    ranks = [
        list(
            evaluation_parts(examples.lengths, size, rank=rank, world_size=world, together=together)
        )
        for rank in range(world)
    ]
    assert len({tuple(begins for _, _, begins in batches) for batches in ranks}) == 1
    found = [row for batches in ranks for rows, _, _ in batches for row in rows.tolist()]
    assert sorted(found) == list(range(len(lengths)))
    groups: list[list[int]] = []
    for batches in ranks:
        for rows, part, begins in batches:
            assert 1 <= len(part) <= size
            assert part[: len(rows)] == rows.tolist()
            groups += [[]] if begins else []
            groups[-1] += rows.tolist()
    # those of one rank with parts as large
    wide = evaluation_parts(examples.lengths, size * together)
    assert sorted(filter(None, groups)) == sorted(rows.tolist() for rows, _, _ in wide)
    if world == 1:
        longest = [lengths[row] for row in found]
        assert longest == sorted(longest, reverse=True)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_model_gives_the_same_with_any_padding(lengths: list[int]) -> None:
    examples, model = encoded(lengths), tiny_model("bert")
    rows = list(range(len(lengths)))
    with torch.no_grad():
        states = []
        for multiple in (1, 8, 32):
            batch = examples.batch(rows, multiple)
            batch.pop("labels")
            mask = batch["attention_mask"].bool()
            states.append(model(**batch).last_hidden_state[mask])
        (alone,) = (examples.batch(rows[:1], 1),)
        alone.pop("labels")
        single = model(**alone).last_hidden_state[0]
    for state in states:
        torch.testing.assert_close(state, states[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(single, states[0][: lengths[0]], rtol=0, atol=2e-5)
