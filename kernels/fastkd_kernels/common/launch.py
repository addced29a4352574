"""Launch parameters: data and pure functions, so that a test can read them without a GPU.

Blocks for half precision were timed on an H100, but those of the divergences' two sweeps, which are
chosen by their machine code; every kernel compiles for sm_80, sm_90, sm_100 and gfx942, some with a
register spill, and `tests/test_kernels_compile.py` says of how much.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

# shared memory that one program may use, in bytes: (backend, architecture) -> limit
SHARED_MEMORY = {
    ("cuda", 80): 166_912,
    ("cuda", 90): 232_448,
    ("cuda", 100): 232_448,
    ("hip", "gfx942"): 65_536,
}


# products and sums become one instruction, by whatever default a release of Triton has
FUSION = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """Block sizes and dot precisions (`tl.constexpr` by name), warps and pipeline stages."""

    constants: dict[str, int | str]
    num_warps: int
    num_stages: int

    def block(self, name: str) -> int:
        """A block size by its name."""
        return int(self.constants[name])

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes besides arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSION}


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def is_half(*dtypes: torch.dtype) -> bool:
    """Whether all are bf16 or fp16."""
    return all(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)


def platform() -> str:
    return "hip" if torch.version.hip else "cuda"


@cache
def shared_memory() -> int:
    """Bytes that one program may use on the first GPU; without one, what every CUDA target has."""
    if not torch.cuda.is_available():
        return SHARED_MEMORY["cuda", 80]
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(0)["max_shared_mem"])


def is_large() -> bool:
    """Whether a program may use as much shared memory as on an A100; GPUs of desktops have less."""
    return shared_memory() >= SHARED_MEMORY["cuda", 80]


@cache
def architecture() -> int | str:
    """Architecture of the first GPU, 90 for an H100; without one, the oldest of the targets."""
    if not torch.cuda.is_available():
        return 80
    from triton.runtime import driver

    arch: int | str = driver.active.get_current_target().arch
    return arch


def is_hopper() -> bool:
    """Whether four warps together multiply blocks in shared memory, as on an H100."""
    return architecture() == 90


def holds_products() -> bool:
    """Whether products land in registers: from an A100 to an H100, and on GPUs of desktops; newer
    ones of data centres have a memory for them."""
    chip = architecture()
    return isinstance(chip, int) and (80 <= chip <= 90 or chip >= 120)


def stages_that_fit(most: int, stage: int, besides: int) -> int:
    """Pipeline stages of so many bytes, at most `most`; what stands `besides` them needs two."""
    fitting = [n for n in range(2, most + 1) if n * stage + besides <= shared_memory()]
    return max(fitting, default=1)


def cdiv(size: int, block: int) -> int:
    """Blocks that hold `size`: `triton.cdiv`, which takes microseconds outside of a kernel."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The block that holds `size` columns; `tl.dot` needs at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(exact: bool, on: str) -> str:
    """How `tl.dot` reads fp32 operands: three tf32 products where one would lose the result.

    AMD's matrix cores multiply fp32 as it is.
    """
    if on == "hip":
        return "ieee"
    return "tf32x3" if exact else "tf32"


def whole_head_blocks(
    query: int, key: int, dims: tuple[int, int], dtype: torch.dtype, on: str
) -> dict[str, int | str]:
    """Blocks of an attention kernel that reads whole heads, and how it multiplies a student's."""
    return {
        "BLOCK_QUERY": query,
        "BLOCK_KEY": key,
        "BLOCK_DIM": power_of_two(dims[0]),
        "BLOCK_TEACHER_DIM": power_of_two(dims[1]),
        "SCORE_PRECISION": dot_precision(True, on),
        "GRAD_PRECISION": dot_precision(dtype != torch.float16, on),
    }


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a residual as an operand: fp16 could underflow, so it goes through fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def alignment(tensors: Sequence[Tensor]) -> int:
    """Elements, up to 16 bytes of them, that divide start and length of every row.

    The tensors share shape and dtype; neighbours in the last dimension lie next to each other.
    """
    shape, size = tensors[0].shape, tensors[0].element_size()
    # the lowest bit that is set in any of these is the largest power of two that divides them all
    bits = 16 // size | shape[-1]
    for tensor in tensors:
        bits |= tensor.data_ptr() // size
    for strides in {tensor.stride() for tensor in tensors}:
        # also where there is one row: addresses of the next, which are masked, are aligned as well
        for stride in strides[:-1]:
            bits |= stride
    return bits & -bits
