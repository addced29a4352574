"""Products of fp32 matrices that stay so, where a program lets its GPU round them to TF32, or runs
under autocast.

Triton kernels say for each product what it reads, and the vendor's library multiplies half
precision alone (`library_products.py`). What is left are torch's own products of a call that runs
on a GPU by `backend="torch"`, and sums over pairs in a backward.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context in which products of a kind of device, such as "cuda", are of what they are given,
    whatever autocast would make of them; nothing where they are already."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def fp32_products() -> AbstractContextManager[None]:
    """A context in which they are fp32; nothing where they are already."""
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return nullcontext()
    return _without_tf32()


@contextmanager
def _without_tf32() -> Iterator[None]:
    kept = _legacy()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def _legacy() -> str:
    """What `set_float32_matmul_precision` said; a program that asked for TF32 elsewhere said
    nothing there, and torch refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
