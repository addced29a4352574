"""Into how many relation heads the queries, keys and values of two models can be cut.

What is cut is not as wide as the hidden states: queries are heads times head size, which a
configuration may set freely, and grouped keys and values are narrower (MiniLMv2, arXiv 2012.15828,
section 3.1, has heads times head size = hidden size and no groups).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from fastkd_kernels.attention_divergence.op import MAX_HEAD_DIM

from fastkd.errors import UserError

if TYPE_CHECKING:
    from fastkd.capture import AttentionShape

_VECTORS = {"q": "queries", "k": "keys", "v": "values"}


def check_relation_heads(
    relations: Iterable[str],
    relation_heads: int,
    shapes: tuple[Sequence[AttentionShape], Sequence[AttentionShape]],
) -> None:
    """See that relation heads divide every vector that is cut.

    Args:
        relations: of qq, kk, vv and qk.
        relation_heads: into how many heads.
        shapes: of the layers of student and teacher.

    Raises:
        UserError: naming the relation, the model and the width; or heads wider than the kernels of
            a GPU take, where there is one.
    """
    for relation in relations:
        for side, found in zip(("student", "teacher"), shapes, strict=True):
            for letter, shape in itertools.product(relation, found):
                what = f"{_VECTORS[letter]} that {relation} compares"
                _check_cut(shape.width(letter, relation), relation_heads, what, side)


def _check_cut(width: int, heads: int, what: str, side: str) -> None:
    if width % heads:
        raise UserError(
            f"losses.relations cuts vectors into {heads} relation heads, but the {what} are "
            f"{width} wide in the {side}; set losses.relations.relation_heads to a divisor of all "
            "widths"
        )
    if torch.cuda.is_available() and width // heads > MAX_HEAD_DIM:
        raise UserError(
            f"losses.relations cuts vectors into {heads} relation heads, but the {what} are "
            f"{width} wide in the {side}, and the kernels of a GPU take heads of up to "
            f"{MAX_HEAD_DIM}; set losses.relations.relation_heads to {-(-width // MAX_HEAD_DIM)} "
            "or more"
        )
