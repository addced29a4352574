"""What is said of a term that goes wrong: the losses of the recipe that it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastkd.errors import UserError, one_line
from fastkd.losses.base import Term
from fastkd.plugins import plugin_errors


def key_of(term: Term) -> str:
    """What a term is in a recipe, for messages: `losses.NAME`, or several names."""
    return f"losses.{', '.join(dict.fromkeys(match.term for match in term.matches))}"


@contextlib.contextmanager
def errors_at(where: str, term: Term) -> Iterator[None]:
    """Let what a term's ops refuse, or a plugin's term raises, name its losses.

    Raises:
        UserError: that.
    """
    try:
        with plugin_errors(where, type(term)):
            yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error, None)}") from error


def checked_values(term: Term, found: Any, expected: int) -> Tensor:
    """What a term gave, `expected` values.

    Raises:
        UserError: a loss gives another number of values.
    """
    shape = tuple(found.shape) if isinstance(found, Tensor) else None
    if shape == (expected,) or (shape == () and expected == 1):
        values: Tensor = found.reshape(expected)
        return values
    given = type(found).__name__ if shape is None else f"a tensor of shape {list(shape)}"
    wanted = f"[{expected}]" if expected > 1 else "[] or [1]"
    raise UserError(
        f"{key_of(term)}: {type(term).__name__}.forward gives {given}; expected a tensor of shape "
        f"{wanted}, one value for each of its labels"
    )
