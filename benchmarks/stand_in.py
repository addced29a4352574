"""A GPU that runs nothing, so that what Triton's ops take on the host is timed without a GPU.

Tiny CPU tensors walk through what CUDA tensors walk through: checks, tables, launch parameters,
autograd, torch's own small operations, and Triton's launcher. Triton compiles for sm_90 and does
everything in Python that it does there; in the place of the last step, the call into the CUDA
driver, a stand-in does nothing. So what a GPU adds is the driver's part of each launch and copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from fastkd_kernels import checks
from fastkd_kernels.common import plan, remembered
from fastkd_kernels.common.remembered import Recent
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver


class Launcher:
    """In the place of Triton's launcher: the driver's part of a launch is left out."""

    launches = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        Launcher.launches += 1


class _Driver(GPUDriver):
    """A GPU of sm_90 that runs nothing."""

    def __init__(self) -> None:
        self.launcher_cls = Launcher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def stand_in_gpu() -> Iterator[None]:
    """CPU tensors pass for what Triton takes while the context is open; in a process that has no
    use for Triton's own driver afterwards. Masks are told by their versions, as on a GPU."""
    triton.runtime.driver.set_active(_Driver())
    with (
        patch.object(checks, "triton_interprets", lambda: True),
        patch.object(remembered, "copy_to_compare", lambda source: None),
    ):
        yield


@contextmanager
def ops_by_triton() -> Iterator[None]:
    """In `stand_in_gpu`, calls of ops that name no backend go to Triton too. What they give is as
    it was in memory."""
    chosen = checks.resolve_backend

    def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "triton" if backend == "auto" else chosen(backend, device, dtype)

    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("fastkd_kernels") and getattr(module, "resolve_backend", None) is chosen
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(patch.object(module, "resolve_backend", resolve))
        # no plan of one backend is found again in the other
        stack.enter_context(patch.object(plan, "_plans", Recent()))
        yield
