"""What of a processor a ratio depends on beside its name, which clouds give to several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# units of vectors and matrices as /proc/cpuinfo names them: x86's, then Arm's
_UNITS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "sve", "sve2", "bf16", "i8mm", "sme"),
)
UNITS = "vector and matrix units"
"""What results call them."""


def units(flags: Iterable[str]) -> list[str]:
    """Those among a processor's flags, in one order."""
    found = set(flags)
    return [unit for unit in _UNITS if unit in found]


def name_of(result: Mapping[str, Any]) -> str:
    """The processor of a result, with its units; of older ones, which don't have them, that."""
    name = result.get("processor", "one without a name")
    if UNITS not in result:
        return f"{name}, its units not noted"
    return f"{name} with {', '.join(result[UNITS]) or 'no units known here'}"
