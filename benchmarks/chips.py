"""The chips of the floor: what they reach at most, as their vendors publish it."""

from typing import NamedTuple

from fastkd.training.chips import CHIPS as FORECAST

Target = tuple[str, int | str]


class Chip(NamedTuple):
    """Peak bytes and dense bf16 operations a second, and what one multiprocessor does a cycle.

    `lanes` are results a cycle and multiprocessor of each unit in `issue.py`: the throughput table
    of the CUDA C++ Programming Guide ("Arithmetic Instructions"), `memory` from its chapter on
    compute capabilities. `flops_of_cycle` are bf16 operations of the tensor cores; with the rate
    they give the clock that the vendor's own number holds at. `registers`, `shared` (bytes)
    and `warps` are those of a multiprocessor.
    """

    name: str
    target: Target
    bandwidth: float
    rate: float
    source: str
    multiprocessors: int = 1
    flops_of_cycle: int = 1
    lanes: dict[str, int] = {}  # noqa: RUF012 - never changed
    registers: int = 65536
    shared: int = 0
    warps: int = 64

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.rate / (self.multiprocessors * self.flops_of_cycle)

    @property
    def exponentials(self) -> float:
        """Exponentials a second on the special-function units."""
        return self.multiprocessors * self.lanes["special"] * self.clock


LANES = {"special": 16, "integer": 64, "memory": 32}

CHIPS = (
    Chip(
        *("A100", ("cuda", 80), 2.039e12, FORECAST["a100"].half, "NVIDIA A100 80GB datasheet, SXM"),
        *(108, 2048, LANES, 65536, 164 << 10),
    ),
    Chip(
        *("H100", ("cuda", 90), 3.35e12, FORECAST["h100"].half, "NVIDIA H100 datasheet, SXM"),
        *(132, 4096, LANES, 65536, 228 << 10),
    ),
    Chip(
        *("H200", ("cuda", 90), 4.8e12, FORECAST["h200"].half, "NVIDIA H200 datasheet, SXM"),
        *(132, 4096, LANES, 65536, 228 << 10),
    ),
    Chip(
        *("B200", ("cuda", 100), 8e12, 2.25e15, "NVIDIA HGX B200 datasheet, one GPU"),
        *(148, 8192, LANES, 65536, 228 << 10),
    ),
    # a quarter of the 64 lanes of a compute unit: CDNA3's transcendental instructions
    Chip(
        *("MI300X", ("hip", "gfx942"), 5.3e12, 1307.4e12, "AMD Instinct MI300X data sheet"),
        *(304, 2048, {"special": 16}),
    ),
)
