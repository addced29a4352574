"""GPUs that a run is forecast for: what they hold and reach, as their vendor publishes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChipName = Literal["a100", "h100", "h200", "l4"]


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One GPU."""

    label: str
    memory: float
    """Bytes."""
    half: float
    """Dense operations a second of matrix products in bf16 or fp16."""
    float8: float | None
    """Dense operations a second in float8; `None` where it is not multiplied."""
    single: float
    """Dense operations a second in fp32, without tensor cores, as torch runs them where TF32 is
    off."""
    link: float
    """Bytes a second to its neighbours in one direction: NVLink, or PCIe where there is none."""
    host: float
    """Bytes a second from the memory of the machine: PCIe in one direction."""
    source: str

    @property
    def tf32(self) -> float:
        """Dense operations a second with operands read as TF32: half as many as in bf16, on all of
        these."""
        return self.half / 2


CHIPS: dict[ChipName, Chip] = {
    "a100": Chip(
        label="A100 80 GB SXM",
        memory=80e9,
        half=312e12,
        float8=None,
        single=19.5e12,
        link=300e9,
        host=32e9,
        source="NVIDIA A100 Tensor Core GPU datasheet",
    ),
    "h100": Chip(
        label="H100 SXM",
        memory=80e9,
        half=989.5e12,
        float8=1979e12,
        single=67e12,
        link=450e9,
        host=64e9,
        source="NVIDIA H100 Tensor Core GPU datasheet",
    ),
    "h200": Chip(
        label="H200 SXM",
        memory=141e9,
        half=989.5e12,
        float8=1979e12,
        single=67e12,
        link=450e9,
        host=64e9,
        source="NVIDIA H200 Tensor Core GPU datasheet",
    ),
    "l4": Chip(
        label="L4",
        memory=24e9,
        half=121e12,
        float8=242e12,
        single=30.3e12,
        link=32e9,
        host=32e9,
        source="NVIDIA L4 Tensor Core GPU datasheet",
    ),
}
