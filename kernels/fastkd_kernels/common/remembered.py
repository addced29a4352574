"""What calls make of small inputs and may find again: counts and masks of a step, tables, checks.

A training step calls several ops with the same masks, and its layers often lie where those of the
last step lay. What is found again costs a dictionary's look-up, not a row of tiny launches. The
road not taken: objects that a caller prepares and hands to each op.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Value = TypeVar("Value")

# tensors that are what they seem
PLAIN = frozenset((Tensor, torch.nn.Parameter))

# entries that a cache holds at most, twice: small tables and masks, and what was checked
MOST = 256


class Recent(Generic[Value]):
    """What was last used, between `most` and twice as many entries.

    Two generations: what is asked for moves into the younger one, and once that is full the older
    one is forgotten. A hit costs one look-up. Threads may lose an entry to each other, never get a
    wrong one.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.young: dict[Hashable, Value] = {}
        self.old: dict[Hashable, Value] = {}

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def get(self, key: Hashable) -> Value | None:
        found = self.young.get(key)
        if found is None and (found := self.old.pop(key, None)) is not None:
            self.put(key, found)
        return found

    def put(self, key: Hashable, value: Value) -> None:
        if len(self.young) >= self.most:
            self.young, self.old = {}, self.young
        self.young[key] = value

    def forget(self, key: Hashable, _: object = None) -> None:
        """Also what a weak reference calls when its object has died."""
        self.young.pop(key, None)
        self.old.pop(key, None)

    def clear(self) -> None:
        self.young, self.old = {}, {}


def is_eager() -> bool:
    """Whether calls run now and on what they are given: no trace, mode or functional transform.

    Where one is at work, tensors stand for others, so nothing of them may be kept, and ops go
    through torch's dispatcher, which knows what to do.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Thread(threading.local):
    forgets = False


_thread = _Thread()


@contextmanager
def forgetting() -> Iterator[None]:
    """Nothing that is made inside may be found again, nor is it looked for."""
    before, _thread.forgets = _thread.forgets, True
    try:
        yield
    finally:
        _thread.forgets = before


def lasts(device: torch.device) -> bool:
    """Whether tensors that an op makes now on `device` outlast the call.

    Not those of a CUDA graph's capture, which live in its private pool and have no values yet.
    """
    if _thread.forgets:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def keeps(device: torch.device) -> bool:
    """Whether tensors that an op makes now on `device` may be found again by any call.

    Not those of inference mode either, which autograd would refuse later.
    """
    return not torch.is_inference_mode_enabled() and lasts(device)


# what Triton asks for the stream that it launches on
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def place(device: torch.device) -> Hashable:
    """A device and its current stream, on which whatever was made there is ready."""
    if device.type != "cuda":
        return device
    if _raw_stream is None:
        return device, torch.cuda.current_stream(device).cuda_stream
    return device, _raw_stream(device.index)


class _Source(NamedTuple):
    """A tensor that something was made of, its place among others, and what it was like then."""

    at: int
    ref: weakref.ref[Tensor]
    state: tuple[object, ...]
    copy: Tensor | None


class _Made(NamedTuple):
    """What was made, and of which tensors."""

    sources: list[_Source]
    value: Any


_made: Recent[_Made] = Recent()


def remembered(
    sources: tuple[Tensor | None, ...],
    what: Hashable,
    device: torch.device,
    make: Callable[[], Value],
) -> Value:
    """`make()`, or what it gave for the same, unchanged `sources` and the same `what`.

    `sources` are masks or labels, told apart as objects and by their version, which every in-place
    operation of torch raises; on the CPU also by their values. On a GPU what writes to their memory
    without raising it, such as a collective of torch.distributed, is not seen. They are not kept
    alive, and with them goes what was made of them: it must be no view of theirs.
    """
    if not (is_eager() and keeps(device)):
        return make()
    # what stays away is told by its place
    key = (what, place(device), *map(id, sources))
    found = _made.get(key)
    # an object that died may have left its place in memory to another
    if found is not None and all(
        [
            ref() is (source := sources[at])
            and _state(source) == state
            and (copy is None or torch.equal(cast(Tensor, source), copy))
            for at, ref, state, copy in found.sources
        ]
    ):
        value: Value = found.value
        return value
    # each once: keys and query rows often have the same mask
    given = list({id(one): (at, one) for at, one in enumerate(sources) if one is not None}.values())
    if not all([type(source) is Tensor and not source.is_inference() for _, source in given]):
        return make()
    value = make()
    # bound to the cache, which is still there when the interpreter ends
    forget = partial(_made.forget, key)
    seen = [
        _Source(
            at,
            weakref.ref(source, forget),
            _state(source),
            copy_to_compare(source),
        )
        for at, source in given
    ]
    _made.put(key, _Made(seen, value))
    return value


def copy_to_compare(source: Tensor) -> Tensor | None:
    """Values on the CPU, where a look at them takes microseconds; on a GPU the host would wait."""
    return source.clone() if source.device.type == "cpu" else None


def _state(source: Any) -> tuple[object, ...]:
    return source._version, source.data_ptr(), source.shape, source.stride()
