"""Queries and documents: the texts of a row, where it has several."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div

from fastkd.losses.base import Setting


def queries_and_documents(sequences: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """What belongs to the queries, and to all other texts.

    Args:
        sequences: [rows * texts, dim]; of each row the query is first.
        texts: of a row, two or more.

    Returns:
        [rows, dim], and [rows, texts - 1, dim].
    """
    rows = sequences.reshape(-1, texts, sequences.shape[-1])
    return rows[:, 0], rows[:, 1:]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher | student) of the softmax of logits [rows, choices], mean over rows."""
    found, expected = (logits.log_softmax(dim=-1) for logits in (student, teacher))
    return kl_div(found, expected, reduction="batchmean", log_target=True)


def check_pairs(given: str, setting: Setting) -> None:
    """See that rows have a query and documents, each a sequence of its own.

    Args:
        given: what asks for them.
        setting: the rest of the recipe.

    Raises:
        ValueError: they don't.
    """
    rows = setting.rows
    if rows is None or len(rows.texts) < 2:
        raise ValueError(
            f"{given}, which compares queries with documents, but a row of the data is one text; "
            "set data.documents to row and name the columns of both in data.columns"
        )
    if rows.paired:
        raise ValueError(
            f"{given}, which compares embeddings of queries and documents, but {setting.field} is "
            f"{setting.head}, which reads both as one sequence; leave one of them out"
        )
