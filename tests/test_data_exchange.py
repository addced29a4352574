"""Ranks that share the tokenising of a stream: the batches and positions of a rank alone."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_tokenizer
from tiny_runs import assert_same_run, keys, make_recipe, run_command, run_environment, run_script
from warm_processes import start_ranks

from fastkd.data.prefetch import DEPTH, Prefetched
from fastkd.data.text.exchange import Exchange
from fastkd.data.text.packing import Frame, IntArray, Packer
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.data.text.split import Split
from fastkd.data.text.stream import StreamedDocuments
from fastkd.data.text.tokenize import Encoder
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.rank_timeout import default_timeout
from fastkd.types import Inputs

BATCH = 8


class Threads:
    """An `Exchange` among threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self.world_size = ranks
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.given: list[Any] = [None] * ranks

    def of(self, rank: int) -> Any:
        whole = self

        class Exchange:
            world_size = whole.world_size
            exchanges = 0
            closed = False

            def __init__(self) -> None:
                self.rank = rank

            def __call__(self, arrays: Sequence[IntArray | None]) -> list[list[IntArray | None]]:
                self.exchanges += 1
                whole.given[rank] = list(arrays)
                whole.barrier.wait()
                found = list(whole.given)
                whole.barrier.wait()
                return found

            def close(self) -> None:
                self.closed = True

        return Exchange()


class Counting:
    """An encoder that counts what it was given; from a call on it fails."""

    def __init__(self, encoder: Encoder, failing_from: int | None = None) -> None:
        self.encoder, self.failing_from = encoder, failing_from
        self.texts = self.calls = 0

    def __call__(self, texts: Sequence[str]) -> IntArray:
        self.calls += 1
        if self.failing_from is not None and self.calls >= self.failing_from:
            raise UserError("cannot tokenise")
        self.texts += len(texts)
        return self.encoder(texts)


LINES = [f"w{5 + i} follows w{i}" + i % 5 * " w7" for i in range(300)]


def stream_of(
    folder: Path, exchange: Any = None, failing_from: int | None = None, workers: int = 0
) -> tuple[StreamedDocuments, Counting]:
    path = folder / "a.txt"
    if not path.exists():
        path.write_text("\n".join(LINES) + "\n")
    settings = TextSettings(train=(str(path),), documents="line", heldout_fraction=0.1)
    split = Split(settings, resolve(settings.train, settings), None)
    tokenizer = tiny_tokenizer(400)
    frame = Frame.of(tokenizer, 16)
    encoder = Counting(Encoder(tokenizer, frame.separator), failing_from)
    stream = StreamedDocuments(
        split, encoder, Packer(frame), BATCH, 20, 0, "key", workers, exchange
    )
    return stream, encoder


def in_ranks(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return [each.result() for each in [pool.submit(work, rank) for rank in range(count)]]


def batches(stream: StreamedDocuments, count: int) -> list[Any]:
    return [stream.next_batch().tolist() for _ in range(count)]


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "pending": state["pending"].tolist()}


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 0), (2, 1)])
def test_ranks_share_the_tokenising_and_change_nothing(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    """Over epochs of about 15 batches, from the start and from a position."""
    alone, counted = stream_of(tmp_path)
    first = batches(alone, 21)
    position = alone.state_dict()
    then = batches(alone, 40)
    threads = Threads(ranks)

    def rank(number: int) -> tuple[list[Any], dict[str, Any], list[Any], list[Any], int]:
        stream, encoder = stream_of(tmp_path, threads.of(number), workers=workers)
        with closing(stream):
            made = batches(stream, 21)
            here = plain(stream.state_dict())
            on = batches(stream, 40)
            # also when it is read again, whatever was read ahead
            stream.load_state_dict(position)
            again = batches(stream, 40)
        return made, here, on, again, encoder.texts

    found = in_ranks(ranks, rank)
    for made, here, on, again, _ in found:
        assert made == first
        assert here == plain(position)
        assert on == then and again == then
    if not workers:
        texts = [count for *_, count in found]
        # 61 batches and then 40
        expected = counted.texts * 101 / 61 / ranks
        assert all(0.8 * expected < count < 1.3 * expected for count in texts), (texts, expected)


def made_and_said(stream: StreamedDocuments) -> tuple[list[Any], str]:
    made: list[Any] = []
    with pytest.raises(UserError) as caught:
        while len(made) < 100:
            made.append(stream.next_batch().tolist())
    return made, str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_one_rank_cannot_tokenise_ends_all_at_the_same_batch(
    tmp_path: Path, workers: int
) -> None:
    expected = batches(stream_of(tmp_path)[0], 40)
    threads = Threads(2)

    def rank(number: int) -> tuple[list[Any], str, int]:
        exchange = threads.of(number)
        stream, _ = stream_of(tmp_path, exchange, 6 if number == 1 else None, workers)
        with closing(stream):
            return *made_and_said(stream), exchange.exchanges

    (other, told, exchanges), (made, said, so_many) = in_ranks(2, rank)
    assert said == "cannot tokenise"
    assert told.startswith("data.train: rank 1 could not read or tokenise its share")
    # ten chunks of about a batch
    assert made == other == expected[: len(made)] and 5 < len(made) < 20
    assert exchanges == so_many


def test_a_rank_that_reads_other_text_ends_all_before_it_is_trained_on(tmp_path: Path) -> None:
    """Of as many bytes, in the middle of a file of which a stream looks at both ends."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        stream_of(folder)
    path = folders[1] / "a.txt"
    path.write_text(path.read_text().replace(LINES[150], LINES[150].replace("follows", "w9     ")))
    expected, threads = batches(stream_of(folders[0])[0], 20), Threads(2)

    def rank(number: int) -> tuple[list[Any], str]:
        return made_and_said(stream_of(folders[number], threads.of(number))[0])

    (made, said), other = in_ranks(2, rank)
    assert other == (made, said)
    assert said.startswith("data.train: rank 1 has read other text than rank 0; let every machine")
    assert made == expected[: len(made)] and len(made) < 15


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for folder in (whole, damaged):
        folder.mkdir()
        stream_of(folder)
    text = (damaged / "a.txt").read_bytes()
    at = text.index(LINES[200].encode())
    (damaged / "a.txt").write_bytes(text[:at] + b"\xff" + text[at:])
    alone, line = made_and_said(stream_of(damaged)[0])
    assert "is not UTF-8" in line

    def found(*folders: Path) -> list[Any]:
        threads = Threads(len(folders))
        streams = [stream_of(each, threads.of(rank))[0] for rank, each in enumerate(folders)]
        return in_ranks(len(folders), lambda rank: made_and_said(streams[rank]))

    assert found(damaged, damaged) == [(alone, line)] * 2
    (other, told), one = found(whole, damaged)
    assert one == (alone, line)
    assert told.startswith("data.train: rank 1 could not read or tokenise its share")
    # no further than the round that rank 1 could not end
    assert other[: len(alone)] == alone and len(other) <= len(alone) + 4


def test_no_document_left_is_told_by_every_rank(tmp_path: Path) -> None:
    threads = Threads(2)

    def rank(number: int) -> str:
        stream, _ = stream_of(tmp_path, threads.of(number))
        # as if all were held out
        stream._documents = iter(())
        with pytest.raises(UserError) as caught:
            stream.next_batch()
        return str(caught.value)

    line = "data.train: no document to train on is left after the held-out"
    assert in_ranks(2, rank) == [line, line]


class Streamed:
    """`MicroBatches` of a stream; one rank is slower."""

    epoch = 0

    def __init__(self, stream: StreamedDocuments, seconds: float) -> None:
        self.stream, self.seconds = stream, seconds
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict
        self.close = stream.close

    def next_step(self, step: int) -> list[Inputs]:
        time.sleep(self.seconds)
        return [{"input_ids": self.stream.next_batch()}]


def test_ranks_of_different_speed_leave_and_start_again_together(tmp_path: Path) -> None:
    """What a rank has prepared when it stops, so has the other: neither waits for ever."""
    expected = batches(stream_of(tmp_path)[0], 5)
    threads = Threads(2)

    def rank(number: int) -> tuple[list[Any], int]:
        exchange = threads.of(number)
        stream, _ = stream_of(tmp_path, exchange)
        made = []
        streamed = Streamed(stream, 0.02 * number)
        with closing(Prefetched(streamed, torch.device("cpu"), DEPTH)) as feed:
            start = feed.state_dict()
            # a round of four chunks is about four batches
            for steps in range(1, 6):
                feed.load_state_dict(start)
                taken = [feed.next_step(step)[0]["input_ids"].tolist() for step in range(steps)]
                made.append(taken)
                # the fast one prepares what it can
                time.sleep(0.1 * (1 - number))
        assert exchange.closed
        return made, exchange.exchanges

    found = in_ranks(2, rank)
    for made, _ in found:
        assert made == [expected[:steps] for steps in range(1, 6)]
    assert found[0][1] == found[1][1]
    # nor was one waited for in a step that nobody took
    assert not threads.barrier.broken


def test_ranks_that_gloo_does_not_connect_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**given: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:232] connect: Connection refused")

    monkeypatch.setattr(dist, "new_group", unreachable)
    with pytest.raises(UserError, match=r"^data.streaming: .* rank 1 does not .*SOCKET_IFNAME"):
        Exchange(Ranks(1, 2, torch.device("cpu")))


def streaming_recipe(folder: Path) -> Path:
    data = {"streaming": True, "shuffle_buffer": 10}
    return make_recipe(folder, data=data, train={"steps": 20, "checkpoint_every": 2})


def test_a_run_of_two_ranks_streams_as_one_does(tmp_path: Path) -> None:
    recipe = streaming_recipe(tmp_path)
    whole = tmp_path / "whole"
    done = run_command("distill", str(recipe), *keys({"run.output": str(whole)}))
    assert done.returncode == 0, done.stderr[-3000:]
    # every rank is asked to stop
    done = run_script("disturbed_run.py", "Ctrl-C in step 3", "1", str(recipe), ranks=2)
    assert "stopped after step" in done.stderr, done.stderr[-3000:]
    done = run_command("distill", str(recipe), "--resume", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "run", whole, losses=1e-4, weights=1e-5)


def test_an_exchange_waits_as_all_groups_do_and_warns_of_nothing(ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange = Exchange(ranks)
    backend = exchange._group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == default_timeout()
    exchange.close()


def test_a_rank_that_is_killed_ends_the_other_in_its_exchange(tmp_path: Path) -> None:
    recipe = streaming_recipe(tmp_path)
    script = Path(__file__).parent / "helpers" / "disturbed_run.py"
    command = [str(script), "between two checkpoints", "1", str(recipe)]
    ranks = start_ranks(command, run_environment(), 2)
    try:
        start = time.monotonic()
        _, text = ranks[0].communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert ranks[0].returncode == 1 and "Traceback" not in text, text[-3000:]
        assert "rank 1" in text and "is gone; if it says why itself, mend that; " in text
        assert "start all ranks again with --resume" in text
    finally:
        for rank in ranks:
            rank.end()
