"""Into how many relation heads the queries, keys and values of two models can be cut.

What is cut is not as wide as the hidden states: queries are heads times head size, which a
configuration may set freely, and grouped keys and values are narrower (MiniLMv2, arXiv 2012.15828,
section 3.1, has heads times head size = hidden size and no groups).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from fastkd.capture import AttentionShape
from fastkd.errors import UserError

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
        UserError: naming the relation, the model and the width.
    """
    for relation in relations:
        for side, found in zip(("student", "teacher"), shapes, strict=True):
            for letter, shape in itertools.product(relation, found):
                width = shape.width(letter, relation)
                if width % relation_heads:
                    raise UserError(
                        f"losses.relations cuts vectors into {relation_heads} relation heads, but "
                        f"the {_VECTORS[letter]} that {relation} compares are {width} wide in the "
                        f"{side}; set losses.relations.relation_heads to a divisor of all widths"
                    )
