"""Seeds of what is drawn apart: epochs, ranks, stages."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, number: int) -> int:
    """A seed of 63 bits, unrelated for every pair: seed + number would repeat over seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8]) >> 1
