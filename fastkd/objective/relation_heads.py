"""Into how many relation heads the queries, keys and values of two models can be cut.

What is cut is not as wide as the hidden states: queries are heads times head size, which a
configuration may set freely, and grouped keys and values are narrower (MiniLMv2, arXiv 2012.15828,
section 3.1, has heads times head size = hidden size and no groups).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastkd.errors import UserError

_VECTORS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one model's attention and their sizes."""

    heads: int
    kv_heads: int
    key_size: int
    """Of queries and keys."""
    value_size: int

    def width(self, letter: str, relation: str) -> int:
        """Numbers that a token's vectors have in a relation, all heads together.

        Args:
            letter: q, k or v.
            relation: qq, kk, vv or qk; in qk every key head stands once for each of its queries.
        """
        heads = self.heads if letter == "q" or relation == "qk" else self.kv_heads
        return heads * (self.value_size if letter == "v" else self.key_size)


def attention_shape(config: Any) -> AttentionShape:
    """What a configuration of transformers says of its attention."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        size,
        getattr(config, "v_head_dim", None) or size,
    )


def check_relation_heads(
    relations: Iterable[str], relation_heads: int, shapes: tuple[AttentionShape, AttentionShape]
) -> None:
    """See that relation heads divide every vector that is cut.

    Args:
        relations: of qq, kk, vv and qk.
        relation_heads: into how many heads.
        shapes: of student and teacher.

    Raises:
        UserError: naming the relation, the model and the width.
    """
    for relation in relations:
        for side, shape in zip(("student", "teacher"), shapes, strict=True):
            for letter in relation:
                width = shape.width(letter, relation)
                if width % relation_heads:
                    raise UserError(
                        f"losses.relations cuts vectors into {relation_heads} relation heads, but "
                        f"the {_VECTORS[letter]} that {relation} compares are {width} wide in the "
                        f"{side}; set losses.relations.relation_heads to a divisor of all widths"
                    )
