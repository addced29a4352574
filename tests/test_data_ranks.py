"""A rank makes its own rows alone, and they are those of the whole step, however it is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer, write_text
from tiny_tasks import encoded

from fastkd.data.batching import BatchPlan
from fastkd.data.tasks import Columns, Task
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.tokenized import EncodedExamples
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.datamodule import TextDataModule
from fastkd.data.text.mlm import Masking
from fastkd.distributed import Ranks
from fastkd.types import ROWS, Inputs

BATCH, STEPS = 24, 9
# micro-batch, accumulation, ranks
CUTS = [(24, 1, 1), (3, 8, 1), (12, 1, 2), (2, 3, 4), (1, 1, 24)]


def text(folder: Path, streaming: bool, masked: bool) -> TextDataModule:
    tokenizer = tiny_tokenizer()
    path = write_text(folder / "corpus.txt", documents=60, words=60)
    settings = TextSettings(
        train=(str(path),),
        heldout_fraction=0.2,
        block_size=14,
        streaming=streaming,
        shuffle_buffer=10,
        cache=str(folder / "cache"),
    )
    corpus = prepare_corpus(settings, tokenizer, progress=False)
    return TextDataModule(corpus, 14, Masking(tokenizer, 0.3, 5) if masked else None)


def steps(datamodule: Any, plan: BatchPlan, rank: int) -> list[list[Inputs]]:
    feed = datamodule.micro_batches(BATCH, 3, plan, rank)
    return [list(feed.next_step(step)) for step in range(STEPS)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_is_cut_exactly(tmp_path: Path, streaming: bool, masked: bool) -> None:
    datamodule = text(tmp_path, streaming, masked)
    whole = [inputs for (inputs,) in steps(datamodule, BatchPlan(BATCH, 1, 1), 0)]
    # blocks of a stream have no numbers
    names = {"input_ids"} | ({"labels"} if masked else set()) | (set() if streaming else {ROWS})
    assert all(set(inputs) == names for inputs in whole)
    stream = datamodule.corpus.stream(BATCH, 3)
    if not masked:
        assert all(torch.equal(inputs["input_ids"], stream.next_batch()) for inputs in whole)
    for cut in CUTS:
        plan = BatchPlan(*cut)
        ranks = [steps(datamodule, plan, rank) for rank in range(plan.world_size)]
        for number, expected in enumerate(whole):
            parts = [part for rank in ranks for part in rank[number]]
            assert {len(part["input_ids"]) for part in parts} == {plan.micro_batch_size}
            for name, value in expected.items():
                assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_held_out_text_is_masked_alike_whoever_reads_it(tmp_path: Path, size: int) -> None:
    datamodule = text(tmp_path, False, True)
    count = len(datamodule.corpus.heldout)
    assert count > 7
    (whole,) = datamodule.heldout(count, Ranks(0, 1, torch.device("cpu")))
    seen = []
    for rank in range(3):
        for batch in datamodule.heldout(size, Ranks(rank, 3, torch.device("cpu"))):
            counted = len(batch.rows)
            seen += batch.rows.tolist()
            for name, value in batch.inputs.items():
                assert torch.equal(value[:counted], whole.inputs[name][batch.rows])
    assert sorted(seen) == list(range(count))


class Noted(EncodedExamples):
    """Notes how many examples are read."""

    read = 0

    def batch(self, rows: Any, multiple: int = 8) -> dict[str, torch.Tensor]:
        Noted.read += len(rows)
        return super().batch(rows, multiple)


@pytest.mark.parametrize("counts_padding", [False, True])
def test_examples_are_cut_exactly(counts_padding: bool) -> None:
    given = encoded([3 + (7 * number) % 50 for number in range(100)], 61)
    examples = Noted(**{name: vars(given)[name] for name in given.__dataclass_fields__})
    columns = Columns(texts=("text",), label="label")
    task = Task(name="tiny", columns=columns, labels=("a", "b"))
    datamodule = TaskDataModule(task, examples, {}, counts_padding)
    (whole, *_), *_ = steps(datamodule, BatchPlan(BATCH, 1, 1), 0)
    for cut in CUTS:
        plan = BatchPlan(*cut)
        Noted.read = 0
        ranks = [steps(datamodule, plan, rank)[0] for rank in range(plan.world_size)]
        assert Noted.read == BATCH * STEPS
        # the rows go to the ranks in turn
        parts = [part for turn in zip(*ranks, strict=True) for part in turn]
        assert torch.equal(torch.cat([part["labels"] for part in parts]), whole["labels"])
        first = 0
        for part in parts:
            mask = part["attention_mask"]
            width = mask.shape[1]
            ids = whole["input_ids"][first : first + len(mask)]
            assert torch.equal(part["input_ids"], ids[:, :width])
            assert not whole["attention_mask"][first : first + len(mask), width:].any()
            own = min(-(-int(mask.sum(dim=1).max()) // 8) * 8, 61)
            assert width == (whole["input_ids"].shape[1] if counts_padding else own)
            first += len(mask)
