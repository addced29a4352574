"""What tests say of the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# a run in this process takes a GPU wherever there is one
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a run on a CPU")


@contextmanager
def no_wait() -> Iterator[None]:
    """Let what waits for a GPU raise, where there is one."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
