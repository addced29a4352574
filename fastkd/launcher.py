"""What a launcher of ranks says of this process in its environment, read before torch is."""

from __future__ import annotations

import os

from fastkd.errors import UserError


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process is the first rank, or the first of its machine."""
    return is_first() or os.environ.get("LOCAL_RANK", "0") == "0"


def as_said_here(error: UserError) -> str:
    """What a mistake is on this rank, of which the first one's terminal perhaps knows nothing."""
    return str(error) if is_first() else f"rank {os.environ['RANK']}: {error}"
