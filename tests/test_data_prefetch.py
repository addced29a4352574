"""Steps prepared ahead: the same as without, where they stand, and what goes wrong in them."""

import gc
import random
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.data.prefetch import DEPTH, Prefetched
from fastkd.errors import UserError
from fastkd.types import ROWS, Inputs

CPU = torch.device("cpu")


class Counted:
    """`MicroBatches` that count: the position is the number that comes next, an epoch is ten."""

    def __init__(self, damaged: int | None = None) -> None:
        self.position = 0
        self.damaged = damaged
        self.closed = False
        self.steps: list[int] = []

    @property
    def epoch(self) -> int:
        return self.position // 10

    def next_step(self, step: int) -> Sequence[Inputs]:
        if self.position == self.damaged:
            raise UserError(f"byte {self.position}")
        self.steps.append(step)
        self.position += 1
        return [{"input_ids": torch.tensor([self.position - 1, step])}]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        self.closed = True


def taken(prefetched: Prefetched, steps: range) -> list[list[int]]:
    return [prefetched.next_step(step)[0]["input_ids"].tolist() for step in steps]


def settle(source: Counted, count: int) -> None:
    """Wait until so many steps are prepared, and see that it stays so."""
    deadline = time.monotonic() + 10
    while len(source.steps) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(source.steps) == count


def test_steps_come_in_their_order_and_a_few_ahead() -> None:
    source = Counted()
    with closing(Prefetched(source, CPU, DEPTH)) as prefetched:
        assert not source.steps
        assert taken(prefetched, range(100, 103)) == [[0, 100], [1, 101], [2, 102]]
        settle(source, 3 + DEPTH)


def test_beside_a_processor_that_trains_runs_no_thread() -> None:
    before = set(threading.enumerate())
    source = Counted()
    with closing(Prefetched(source, CPU)) as prefetched:
        assert taken(prefetched, range(100, 103)) == [[0, 100], [1, 101], [2, 102]]
        assert len(source.steps) == 3 and set(threading.enumerate()) == before
        assert prefetched.state_dict() == {"position": 3}


def test_position_and_epoch_are_those_of_the_steps_that_were_taken() -> None:
    source = Counted()
    with closing(Prefetched(source, CPU, DEPTH)) as prefetched:
        assert (prefetched.state_dict(), prefetched.epoch) == ({"position": 0}, 0)
        for step in range(25):
            prefetched.next_step(step)
            settle(source, step + 1 + DEPTH)
            assert prefetched.state_dict() == {"position": step + 1}
            assert prefetched.epoch == (step + 1) // 10


def test_a_mask_is_left_out_where_it_hides_nothing() -> None:
    mask = torch.ones(2, 3, dtype=torch.int64)
    source = Counted()
    given = {"input_ids": mask + 4, "attention_mask": mask, ROWS: torch.arange(2)}
    source.next_step = lambda step: [dict(given)]  # type: ignore[method-assign]
    with closing(Prefetched(source, CPU)) as prefetched:
        assert prefetched.next_step(0)[0].keys() == {"input_ids"}
        mask[1, 2] = 0
        (read,) = prefetched.next_step(1)
        assert read.keys() == {"input_ids", "attention_mask"}
        assert torch.equal(read["attention_mask"], mask)


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_steps_are_read_again(depth: int) -> None:
    source = Counted()
    with closing(Prefetched(source, CPU, depth)) as prefetched:
        taken(prefetched, range(4))
        position = prefetched.state_dict()
        expected = taken(prefetched, range(4, 9))
        prefetched.load_state_dict(position)
        assert prefetched.state_dict() == position
        assert taken(prefetched, range(4, 9)) == expected
    fresh = Prefetched(Counted(), CPU, depth)
    with closing(fresh):
        fresh.load_state_dict(position)
        assert taken(fresh, range(4, 9)) == expected


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_what_goes_wrong_is_raised_at_its_step(depth: int) -> None:
    source = Counted(damaged=4)
    with closing(Prefetched(source, CPU, depth)) as prefetched:
        assert taken(prefetched, range(4))[-1] == [3, 3]
        with pytest.raises(UserError, match="byte 4"):
            prefetched.next_step(4)
        assert prefetched.state_dict() == {"position": 4}


@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_is_left_behind(steps: int) -> None:
    before = set(threading.enumerate())
    source = Counted()
    with pytest.raises(KeyboardInterrupt), closing(Prefetched(source, CPU, DEPTH)) as prefetched:
        taken(prefetched, range(steps))
        raise KeyboardInterrupt
    assert source.closed
    made = len(source.steps)
    assert set(threading.enumerate()) == before
    time.sleep(0.02)
    assert len(source.steps) == made


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_random_numbers_of_the_process_stay_as_they_are(depth: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    with closing(Prefetched(Counted(), CPU, depth)) as prefetched:
        taken(prefetched, range(5))
    gc.collect()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tobytes() == before[2]
