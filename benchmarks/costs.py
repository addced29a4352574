"""What each op has to do at least: bytes, matrix products and exponentials. Pure functions.

Bytes are compulsory: every input read once, every gradient written once, forward and backward
together; masks, tables and partial sums are left out. Operations are those of the matrix products
of the algorithm that Triton runs, two a multiply-add, recomputed products included, blocks beyond a
causal diagonal not. One call covers `pairs` layer pairs.

Exponentials are two a score or logit, one for either softmax: loss and gradient of every kind need
both probabilities of each outcome, and a row that stays in registers from loss to gradient makes
them once (an indexer has one softmax for all heads of its teacher). The kernels, which stream, make
them again in each backward launch, and more to rescale running sums; that is theirs to save.
Logarithms (mixtures) have good polynomials and are not counted. So have exponentials: what runs
them on plain arithmetic could pass this part of the floor, and would have its instructions counted
instead.
"""

from typing import NamedTuple

import torch
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from fastkd_kernels.attention_score_mse.triton_path import causal_chunk

from benchmarks.workloads import (
    AttentionWorkload,
    HiddenWorkload,
    IndexerWorkload,
    LogitsWorkload,
)


class Cost(NamedTuple):
    """Compulsory bytes, operations of the matrix products, exponentials of the softmaxes."""

    bytes: int
    flops: int
    exponentials: int = 0

    def times(self, count: int) -> "Cost":
        return Cost(*(count * part for part in self))


# exponentials of one score or logit: of the student's and of the teacher's softmax
SOFTMAXES = 2
# kinds that compare what goes into a softmax
WITHOUT_SOFTMAX = {"logits_divergence": ("mse",)}


def of_kind(cost: Cost, op: str, kind: str) -> Cost:
    """The cost of one kind of loss of an op; plain costs are of those with softmaxes."""
    return cost._replace(exponentials=0) if kind in WITHOUT_SOFTMAX.get(op, ()) else cost


def entries(work: AttentionWorkload, chunk: int | None = None) -> int:
    """Scores of one layer that are looked at; under a causal mask those inside chunks of tokens."""
    of_head = work.tokens**2
    if work.causal:
        whole, rest = divmod(work.tokens, chunk or work.tokens)
        of_head = whole * _triangle(chunk or work.tokens) + _triangle(rest)
    return work.batch * work.heads * of_head


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def attention_inputs(work: AttentionWorkload, dtype: torch.dtype) -> int:
    """Queries and keys of both models, once."""
    rows = work.batch * work.tokens
    sides = ((work.heads + kv) * dim for kv, dim in zip(work.kv_heads, work.dims, strict=True))
    return rows * sum(sides) * dtype.itemsize


def attention_bytes(work: AttentionWorkload, dtype: torch.dtype) -> int:
    """Queries and keys of both models read, gradients of the student's written."""
    rows = work.batch * work.tokens
    own, target = (
        (work.heads + kv) * dim for kv, dim in zip(work.kv_heads, work.dims, strict=True)
    )
    return rows * (2 * own + target) * dtype.itemsize


def attention_score_mse(work: AttentionWorkload, pairs: int, dtype: torch.dtype) -> Cost:
    """Causal Grams go from chunk to chunk, and tiles make what is inside one."""
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend="triton")
    chunk = causal_chunk(work.dims) if chosen == "gram" and work.causal else work.tokens
    flops = 0
    if chosen == "tiles" or work.causal:
        flops += score_mse_tiles(work, chunk)
    if chosen == "gram" and not (work.causal and chunk >= work.tokens):
        flops += score_mse_gram(work)
    return Cost(attention_bytes(work, dtype), flops).times(pairs)


def score_mse_tiles(work: AttentionWorkload, chunk: int) -> int:
    """Both score matrices, `D K_s` and `D^T Q_s`."""
    return 2 * entries(work, chunk) * (sum(work.dims) + 2 * work.dims[0])


def score_mse_gram(work: AttentionWorkload) -> int:
    """Three blocks of either side's Gram, then two products of `dim_s + dim_t` by `dim_s`."""
    own, target = work.dims
    # query heads that share both key heads; the finer of two nested groupings
    groups = max(work.kv_heads)
    rows = work.batch * work.tokens * (work.heads + groups)
    return 2 * rows * (own**2 + own * target + target**2 + (own + target) * own)


def attention_divergence(work: AttentionWorkload, pairs: int, dtype: torch.dtype) -> Cost:
    """Both scores, and a product for either gradient: what no kernel can leave out."""
    own, target = work.dims
    flops = 2 * entries(work) * (own + target + 2 * own)
    return Cost(attention_bytes(work, dtype), flops, SOFTMAXES * entries(work)).times(pairs)


def indexer_divergence(work: IndexerWorkload, pairs: int, dtype: torch.dtype) -> Cost:
    """The teacher's scores twice, for its sums and for the target; the indexer's three times, and a
    product for queries' and one for keys' gradients.

    All states are read, and gradients of the indexer's queries, key and weights written. The target
    is a sum of probabilities, one exponential of every teacher head's score; the indexer's softmax
    is over the sum of its heads, one more. Its logarithm and that of the target are not counted.
    """
    dim, teacher_dim = work.dims
    rows = work.batch * work.tokens
    seen = work.batch * (_triangle(work.tokens) if work.causal else work.tokens**2)
    own = work.index_heads * (dim + 1) + dim
    target = (work.heads + work.kv_heads) * teacher_dim
    flops = 2 * seen * (2 * work.heads * teacher_dim + 5 * work.index_heads * dim)
    made = seen * (work.heads + 1)
    return Cost(rows * (2 * own + target) * dtype.itemsize, flops, made).times(pairs)


def hidden(work: HiddenWorkload, pairs: int, dtype: torch.dtype) -> Cost:
    """Projection, and the residual times the weight and times the states; none without a weight.

    One weight and bias for all pairs.
    """
    own, target = work.widths
    rows = work.batch * work.tokens
    states = Cost(rows * (2 * own + target) * dtype.itemsize, 6 * rows * own * target)
    weights = 2 * (own + 1) * target * dtype.itemsize
    if own == target:
        return states._replace(flops=0).times(pairs)
    return states.times(pairs)._replace(bytes=states.bytes * pairs + weights)


def logits_divergence(work: LogitsWorkload, pairs: int, dtype: torch.dtype) -> Cost:
    """Both logits, and the student's gradients of states and head, in one pass."""
    own, target = work.widths
    rows = work.batch * work.tokens
    moved = (rows + work.vocabulary) * (2 * own + target)
    flops = 2 * rows * work.vocabulary * (own + target + 2 * own)
    made = SOFTMAXES * rows * work.vocabulary
    return Cost(moved * dtype.itemsize, flops, made).times(pairs)
