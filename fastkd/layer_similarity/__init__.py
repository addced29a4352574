"""How alike the layers of two models are: what to look at before a layer map is chosen.

Linear CKA compares hidden states, whatever their widths; a divergence of attention probabilities
compares blocks. Both are means over valid tokens, of all pairs of a student's and a teacher's
layers. No [tokens, tokens] matrix is made: CKA is taken from the second moments of the features,
divergences stream over the keys.
"""

from fastkd.layer_similarity.cka import LinearCKA
from fastkd.layer_similarity.compare import (
    Similarity,
    inspect_layers,
    measure,
)
from fastkd.layer_similarity.report import (
    notes,
    print_similarity,
    write_similarity,
)

__all__ = [
    "LinearCKA",
    "Similarity",
    "inspect_layers",
    "measure",
    "notes",
    "print_similarity",
    "write_similarity",
]
