"""What a launcher of ranks says of this process in its environment, read before torch is."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fastkd.errors import UserError

_SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process is the first rank, or the first of its machine."""
    return is_first() or os.environ.get("LOCAL_RANK", "0") == "0"


def as_said_here(error: UserError) -> str:
    """What a mistake is on this rank, of which the first one's terminal perhaps knows nothing."""
    return str(error) if is_first() else f"rank {os.environ['RANK']}: {error}"


def require_one_process(command: str, instead: str = "") -> None:
    """See that what one process does isn't started as several ranks, which would each do it.

    Args:
        command: for people.
        instead: what to do for more at a time.

    Raises:
        UserError: there are several.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    # a scheduler's size alone makes no ranks
    if "RANK" in os.environ and ranks != "1":
        raise UserError(
            f"{command} is done by one process, but there are {ranks} ranks; start it without "
            f"torchrun or deepspeed{instead}"
        )


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be no rank."""
    return {name: value for name, value in environment.items() if name not in _SET}
