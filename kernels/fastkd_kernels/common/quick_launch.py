"""Launches of kernels that Triton has compiled, without its look at every argument.

`kernel[grid](...)` tells each call's arguments apart in Python: 30 to 60 us for the thirty that our
kernels take. What it tells apart by is known here at less: dtypes and alignments of tensors, and
plain values. Under the same ones the compiled kernel that it returned the first time is launched,
as Triton's tutorial of fused softmax does.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .remembered import Recent


class _Compiled(NamedTuple):
    """A compiled kernel, its parameters behind those given by position, and what it is of."""

    compiled: Any
    names: tuple[str, ...]
    # kept, so that no other kernel gets its place in memory, by which it is known
    kernel: Any


_compiled: Recent[_Compiled] = Recent()
_dtype, _address = attrgetter("dtype"), Tensor.data_ptr


# starts the compiled kernel, and the arguments behind those given by position
Start = tuple[Callable[..., None], list[Any]]


class Quick:
    """A kernel that is launched as before: `Quick(kernel)[grid](*tensors_and_sizes, **rest)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    @property
    def finds(self) -> bool:
        """Whether the kernel is compiled, and by what is known here of its arguments."""
        # the interpreter compiles nothing, and AMD's compiler looks at the sizes of tensors too
        return isinstance(self.kernel, triton.JITFunction) and not torch.version.hip

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if not self.finds:
            launch: Callable[..., None] = self.kernel[grid]
            return launch

        def launched(*given: Any, **rest: Any) -> None:
            start = self._start(grid, _kinds(given), given, rest)
            if start is not None:
                start[0](*given, *start[1])

        return launched

    def bound(self, grid: tuple[int, ...], **rest: Any) -> Callable[..., None]:
        """The launch that lacks only tensors, which come by position, as a plan keeps it."""
        if not self.finds:
            return lambda *given: self.kernel[grid](*given, **rest)
        found: dict[tuple[Any, ...], Start] = {}

        def launched(*tensors: Tensor) -> None:
            # what `_kinds` tells, quicker
            kinds = (
                triton.runtime.driver.active.get_current_device(),
                *map(_dtype, tensors),
                *[address % 16 == 0 for address in map(_address, tensors)],
            )
            start = found.get(kinds)
            if start is None:
                start = self._start(grid, _kinds(tensors), tensors, rest)
                if start is None:
                    return
                found[kinds] = start
            start[0](*tensors, *start[1])

        return launched

    def _start(
        self,
        grid: tuple[int, ...],
        kinds: tuple[Any, ...],
        given: tuple[Any, ...],
        rest: dict[str, Any],
    ) -> Start | None:
        """None where Triton had to compile the kernel, and has launched it."""
        key = (id(self.kernel), *kinds, *rest, *rest.values())
        found = _compiled.get(key)
        if found is None:
            made = self.kernel[grid](*given, **rest)
            if made is not None:
                names = tuple(self.kernel.arg_names[len(given) :])
                _compiled.put(key, _Compiled(made, names, self.kernel))
            return None
        return found.compiled[(*grid, 1, 1)[:3]], [*map(rest.__getitem__, found.names)]


def _kinds(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The device, and what Triton tells arguments apart by."""
    return (
        triton.runtime.driver.active.get_current_device(),
        # tensors come by position; of the others, values tell all
        *[
            (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else value
            for value in given
        ],
    )
