"""Whether every rank was given the same: a command, a recipe, overrides.

Each rank reads them for itself. With another learning rate or other losses on a second machine a
run would go on, and end as the student of neither.
"""

from __future__ import annotations

import json
from typing import Any

from fastkd.distributed import Ranks
from fastkd.errors import SharedError
from fastkd.recipe import AnyRecipe
from fastkd.training.continuation import flat
from fastkd.training.started_paths import PLACES

_APART = (*PLACES, "data.workers", "teacher.cache_folder")
"""What says only where a machine keeps things, and how many processes it has for them: what is read
there is compared by its content, see `alike.py` and `data/factory.py`."""
# characters of a value, for people
_SHOWN = 100


def check_recipes(command: str, recipe: AnyRecipe, ranks: Ranks, **options: Any) -> None:
    """See that all ranks were given the same; their first collective, and nothing on one rank.

    Args:
        command: what they were asked for.
        recipe: with its overrides, as it was given.
        ranks: this process among all.
        options: of the command, by name.

    Raises:
        SharedError: naming the first field in which a rank's recipe isn't that of rank 0.
    """
    if ranks.world_size == 1:
        return
    fields = dict(flat(recipe.model_dump(mode="json")))
    given = {"command": command, **options, **fields}
    first, *others = ranks.gather({key: json.dumps(value) for key, value in given.items()})
    for rank, found in enumerate(others, start=1):
        for key in first | found:
            one, other = first.get(key), found.get(key)
            if one != other and not key.endswith(_APART):
                raise SharedError(
                    f"{key}: {ranks.called(rank)} was given {_differing(one, other)}; give all "
                    "ranks the same recipe and overrides"
                )


def _differing(first: str | None, found: str | None) -> str:
    """What another rank was given, and the first; `None` is nothing."""
    one, other = ("nothing" if text is None else text for text in (first, found))
    if max(len(one), len(other)) > _SHOWN:
        return "another value than rank 0"
    return f"{other}, rank 0 {one}"
