"""Names shared by every op: what a layer hands over, the named modes, the ops' namespace."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Reduction = Literal["valid", "tinybert"]
Backend = Literal["auto", "torch", "triton"]
Tokens = Literal["all", "cls"]
Algorithm = Literal["auto", "tiles", "gram"]
AttentionDivergenceKind = Literal["kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine"]
"""What compares the attention probabilities of a row; "mse" is a sum over keys."""
LogitsDivergenceKind = Literal["kl", "reverse_kl", "js", "skew_kl", "mse", "cross_entropy"]
"""What compares the logits of a row; "mse" is of raw logits, and a mean over the vocabulary."""
AttentionReduction = Literal["tokens", "sequences"]
"""How the values of query rows are averaged: "tokens" is their mean over the batch; "sequences" is
first the mean over the rows and heads of each sequence, then over the sequences that have rows."""
Relation = Literal["qq", "kk", "vv", "qk"]

# our ops' place in torch.ops: the package's name, so that a copy loaded under another (as Hugging
# Face's kernels does) brings its own
NAMESPACE = str(__package__).replace(".", "_")


class AttentionState(NamedTuple):
    """Queries, keys and values of one attention layer, before the softmax and before GQA's repeat.

    query: `[batch, heads, tokens, head_dim]`; key and value: `[batch, kv_heads, tokens, head_dim]`,
    where `kv_heads` divides `heads`. `value` may be None for an op that does not read it. `scale`
    is the factor that the model puts on `query @ key^T`, of a size from 1e-20 to 1e20.

    `softcap`, from 1e-20 to 1e20, is Gemma 2's: scores become `softcap * tanh(score / softcap)`
    before the softmax. `sinks` `[heads]` are the attention sinks of GPT-OSS: a logit a head that
    joins the softmax of each row and holds no value. `attention_divergence` and
    `indexer_divergence` alone read these two.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class IndexerState(NamedTuple):
    """Queries, key and head weights of one lightning indexer (DeepSeek-V3.2).

    query: `[batch, index_heads, tokens, dim]`; key: `[batch, tokens, dim]` or `[batch, 1, tokens,
    dim]`, one for all heads; weights: `[batch, tokens, index_heads]`, which hold every scale that
    the model puts on its scores `sum_h weights[t, h] * relu(query[h, t] @ key[s])`.
    """

    query: Tensor
    key: Tensor
    weights: Tensor


# one pair's teacher, and for each pair the weights of its layers (None: an even average)
TeacherLayers = AttentionState | Sequence[AttentionState]
TeacherWeights = Sequence[Sequence[float] | None]


class LogitsHead(NamedTuple):
    """What a model's logits are made of: `scale * (hidden @ weight^T + bias)`, never stored.

    hidden: `[batch, tokens, width]` or `[rows, width]`; weight: `[vocab, width]` as in `nn.Linear`;
    bias: `[vocab]` or None. `scale` is the factor that Granite, Cohere and Falcon-H1 put on what
    the last layer gives. With a `softcap`, Gemma 2's, logits z become `softcap * tanh(z / softcap)`
    (arXiv 2408.00118, section 2). Both are from 1e-20 to 1e20.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
