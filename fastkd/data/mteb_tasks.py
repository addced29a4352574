"""Tasks of MTEB (arXiv 2210.07316), by the package `mteb`: found by name, their data loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.extras import need


def load_tasks(names: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """Tasks by name, whose data is in memory; the first rank downloads what is not there.

    Args:
        names: as `mteb.get_task` takes them.
        ranks: this process among all; every rank calls this.

    Raises:
        UserError: the package is missing, knows no such task, or its data can't be had.
    """
    if not names:
        return {}
    need("evaluate.mteb", "mteb")
    made: list[dict[str, Any]] = []
    ranks.from_main(lambda: made.append(_load(names)))
    return ranks.on_each(lambda: made[0] if made else _load(names))


def task_digest(task: Any) -> str:
    """Digest of what says which data a task has: where it is on the hub, and its revision."""
    said = json.dumps(dict(task.metadata.dataset), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _load(names: Sequence[str]) -> dict[str, Any]:
    return {name: _loaded(name) for name in names}


def _loaded(name: str) -> Any:
    import mteb

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        said = one_line(error).strip("\"'").removeprefix("KeyError: ")
        raise UserError(f"evaluate.mteb: {said}; give the name of a task of mteb") from error
    if list(task.metadata.modalities) != ["text"]:
        raise UserError(
            f"evaluate.mteb: task {name} reads {', '.join(task.metadata.modalities)}, expected "
            "text alone; leave it out"
        )
    try:
        task.load_data()
    # what datasets and the hub raise without a network, and mteb of a task that has no data
    except (OSError, *FOREIGN_ERRORS) as error:
        raise UserError(
            f"evaluate.mteb: the data of task {name} can't be loaded ({one_line(error)}); it comes "
            "from the hub: load it once where there is a network, or leave the task out"
        ) from error
    return task
