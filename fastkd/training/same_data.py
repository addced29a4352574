"""Whether the data that is there now is what a run has read, by the digests of its parts.

The order of a run's data vouches for what it trains on; its evaluations read more: the sets of a
task, pairs of texts with scores, tasks of mteb. What they say decides which student is handed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastkd.data.tasks.selection import SELECTION
from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe
from fastkd.training.continuation import flat

_SECTIONS = {"data", "task", "evaluate"}
READ_ALIKE = (
    *("data.workers.", "data.cache.", "data.shuffle_buffer.", "data.heldout_blocks."),
    *("data.batch_tokens.", "task.cache.", "task.padding.", "task.evaluate."),
    *("task.metrics.", "task.class_weights."),
)
"""Where and how fast the same is read, and how much or which sets of it are judged."""
_OF_TRAINING = ("task.train.", "task.augmentation.", "task.examples.", "task.selection.")


def require_same_data(
    noted: Mapping[str, str], found: Mapping[str, str], then: str, now: str
) -> None:
    """See that the parts of two sets of data that both have are the same.

    Args:
        noted: digests by part, of then.
        found: those of now.
        then: what read the first, for people.
        now: what to do where the others are not the same.

    Raises:
        UserError: naming the first part that differs.
    """
    for part, digest in found.items():
        if part in noted and _content(noted[part]) != _content(digest):
            raise UserError(
                f"data ({part}): not what {then} read: it has changed, or is read by another "
                f"tokenizer or release; {now}"
            )


def judged_by(digests: Mapping[str, str]) -> dict[str, str]:
    """The parts that an evaluation is of: those to train on are none where others are held out."""
    others = [part for part in digests if part != "train" and field_of(part) is None]
    return {part: digest for part, digest in digests.items() if part != "train" or not others}


def judged_alike(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two evaluations are of the same data, by the digests of what their runs read; not
    where there are none."""
    parts = [{k: _content(v) for k, v in judged_by(each).items()} for each in (one, other)]
    return bool(parts[0]) and parts[0] == parts[1]


def field_of(part: str) -> str | None:
    """The field of `evaluate` that a part is of, `None` where it is of a recipe's data."""
    kind, _, name = part.partition(" ")
    return {"pairs": f"evaluate.pairs.{name}", "mteb": "evaluate.mteb"}.get(kind)


def shared_parts(one: AnyRecipe, other: AnyRecipe, parts: Iterable[str]) -> list[str]:
    """The parts of the data that two recipes of the same models read alike."""
    mine, theirs = (dict(flat(x.model_dump(mode="json", include=_SECTIONS))) for x in (one, other))
    keys = {f"{k}." for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
    keys = {key for key in keys if not key.startswith(READ_ALIKE)}

    def is_shared(part: str) -> bool:
        own = field_of(part)
        of_data = {key for key in keys if not key.startswith("evaluate.")}
        if own is not None:
            return not of_data and not any(key.startswith(f"{own}.") for key in keys)
        return not of_data or (
            part not in ("train", SELECTION)
            and all(key.startswith(_OF_TRAINING) for key in of_data)
        )

    return [part for part in parts if is_shared(part)]


def _content(digest: str) -> str:
    # of two tokenizers: the student's own is stored anew with every student, the teacher's is last
    return digest.rpartition(" ")[2]
