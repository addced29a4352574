"""Launches of kernels that Triton has compiled, without its look at every argument.

`kernel[grid](...)` tells each call's arguments apart in Python: 30 to 60 us for the thirty that our
kernels take. What it tells apart by is known here at less: dtypes and alignments of tensors, and
plain values. Under the same ones the compiled kernel that it returned the first time is launched,
as Triton's tutorial of fused softmax does.
"""

from collections.abc import Callable
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


class Quick:
    """A kernel that is launched as before: `Quick(kernel)[grid](*tensors_and_sizes, **rest)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **rest: self.bound(grid, **rest)(*given)

    def bound(self, grid: tuple[int, ...], **rest: Any) -> Callable[..., None]:
        """The launch that lacks only what comes by position, as a plan keeps it."""
        kernel = self.kernel
        # the interpreter compiles nothing, and AMD's compiler looks at the sizes of tensors too
        if not isinstance(kernel, triton.JITFunction) or torch.version.hip:
            return lambda *given: kernel[grid](*given, **rest)
        words = (id(kernel), *rest, *rest.values())
        # of this grid, with the arguments behind those given
        started: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

        def launch(*given: Any) -> None:
            # tensors come by position; of the others, values tell all
            kinds = (
                triton.runtime.driver.active.get_current_device(),
                *[
                    (value.dtype, value.data_ptr() % 16 == 0)
                    if isinstance(value, Tensor)
                    else value
                    for value in given
                ],
            )
            if kinds not in started:
                found = _compiled.get((kinds, words))
                if found is None:
                    made = kernel[grid](*given, **rest)
                    if made is not None:
                        names = tuple(kernel.arg_names[len(given) :])
                        _compiled.put((kinds, words), _Compiled(made, names, kernel))
                    return
                in_order = tuple([rest[name] for name in found.names])
                started[kinds] = found.compiled[(*grid, 1, 1)[:3]], in_order
            start, in_order = started[kinds]
            start(*given, *in_order)

        return launch
