"""What an op launches, recorded from its own launch functions: on tensors without memory, no GPU.

Inside `recorded`, kernels and the library's products are noted instead of run. Arguments, grids,
constants and warps are therefore those of a call, and no table of them has to be kept in step.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from fastkd_kernels.common import launch, library_products
from fastkd_kernels.common.launch import SHARED_MEMORY
from fastkd_kernels.common.quick_launch import Quick
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

HALF = (torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """One launch of a kernel: every argument by name, programs of its grid, and its options."""

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    options: dict[str, int]

    @property
    def kernel_name(self) -> str:
        return str(self.kernel.__name__)


class Product(NamedTuple):
    """One product `[rows, inner] @ [inner, columns]` of the vendor's library, summed in fp32."""

    rows: int
    inner: int
    columns: int
    bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@contextmanager
def recorded(target: tuple[str, int | str]) -> Iterator[list[Launch | Product]]:
    """What is launched inside, in order, on a back end ("cuda" or "hip") and architecture."""
    made: list[Launch | Product] = []

    def run(self: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(self.arg_names, positional, strict=False))
        arguments |= {name: named[name] for name in named if name in self.arg_names}
        options = {name: named[name] for name in named if name not in self.arg_names}
        # in the order of the signature, which the launcher's key has too
        ordered = {name: arguments[name] for name in self.arg_names}
        made.append(Launch(self, ordered, math.prod(grid), options))

    def takes(on: torch.device, *dtypes: torch.dtype) -> bool:
        return dtypes[0] in HALF and len(set(dtypes)) == 1

    def multiply(
        left: Tensor, right: Tensor, out: Tensor, *, add: bool = False, bias: Tensor | None = None
    ) -> None:
        moved = sum(size_of(one) for one in (left, right, *[out] * (1 + add)))
        made.append(Product(*left.shape, right.shape[1], moved))

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", run))
        stack.enter_context(patch.object(Quick, "finds", False))
        stack.enter_context(patch.object(library_products, "takes", takes))
        stack.enter_context(patch.object(library_products, "multiply", multiply))
        stack.enter_context(
            patch.object(torch.version, "hip", "any" if target[0] == "hip" else None)
        )
        limit = SHARED_MEMORY[target]
        stack.enter_context(patch.object(launch, "shared_memory", lambda: limit))
        stack.enter_context(patch.object(launch, "architecture", lambda: target[1]))
        yield made


def tensor_bytes(launch: Launch) -> int:
    """Bytes of the tensors among the arguments, each once: what stands in for another adds none."""
    tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}
    return sum(size_of(value) for value in tensors.values())


def size_of(tensor: Tensor) -> int:
    """Bytes of its values."""
    return tensor.numel() * tensor.element_size()


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
