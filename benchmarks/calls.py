"""One call of each op on a named workload: what is timed, captured in graphs and checked on a GPU.

Every op that `fastkd_kernels` exports has one here; a new one adds a line to `MAKERS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import fastkd_kernels
import torch
from fastkd_kernels import reference
from torch import Tensor

from benchmarks import costs
from benchmarks.costs import Cost
from benchmarks.inputs import attention_inputs, hidden_inputs, indexer_inputs, logits_inputs
from benchmarks.workloads import (
    ATTENTION,
    HIDDEN,
    INDEXER,
    LOGITS,
    AttentionWorkload,
    HiddenWorkload,
    IndexerWorkload,
    LogitsWorkload,
    Workload,
    on_device,
)

Op = Callable[..., Tensor]


class Call(NamedTuple):
    """An op with its inputs.

    `inputs` are all its float tensors, in whose storage other values may be written; `leaves` are
    those of them that get gradients.
    """

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    inputs: list[Tensor]
    leaves: list[Tensor]
    cost: Cost

    def losses(self) -> Tensor:
        """The op's losses; on the CPU by Triton's interpreter."""
        backend = "auto" if self.inputs[0].is_cuda else "triton"
        op: Op = getattr(fastkd_kernels, self.op)
        return op(*self.arguments, **self.options, backend=backend)

    def step(self) -> list[Tensor]:
        """Losses, and the gradients of their sum."""
        return self._with_gradients(self.losses())

    def definition(self, change: Callable[[Op], Op] = lambda op: op) -> Callable[[], list[Tensor]]:
        """The same by the op's definition, or by what `change` makes of that."""
        defined = change(getattr(reference, self.op))
        return lambda: self._with_gradients(defined(*self.arguments, **self.options))

    def _with_gradients(self, losses: Tensor) -> list[Tensor]:
        return [losses.detach(), *torch.autograd.grad(losses.sum(), self.leaves)]


def _attention(
    op: str, work: AttentionWorkload, pairs: int, dtype: torch.dtype, device: str
) -> Call:
    student, teacher = attention_inputs(work, pairs, dtype, device)
    options: dict[str, Any] = {"causal": work.causal}
    if op == "relation_divergence":
        options |= {"relation": "kk", "relation_heads": work.kv_heads[0]}
    leaves = [t for s in student for t in ((s.key,) if "relation" in options else s[:2])]
    inputs = [tensor for state in (*student, *teacher) for tensor in state[:2]]
    folder = "attention_divergence" if op == "relation_divergence" else op
    return Call(
        op,
        (student, teacher),
        options,
        inputs,
        leaves,
        getattr(costs, folder)(work, pairs, dtype),
    )


def _hidden(op: str, work: HiddenWorkload, pairs: int, dtype: torch.dtype, device: str) -> Call:
    case = hidden_inputs(work, pairs, dtype, device)
    arguments = (case.student, case.teacher)
    inputs = [*case.leaves, *case.teacher]
    cost = costs.hidden(work, pairs, dtype)
    return Call(op, arguments, case.trained, inputs, case.leaves, cost)


def _indexer(op: str, work: IndexerWorkload, pairs: int, dtype: torch.dtype, device: str) -> Call:
    case = indexer_inputs(work, pairs, dtype, device)
    teacher = [tensor for s in case.teacher for tensor in (s.query, s.key, s.sinks)]
    inputs = [*case.leaves, *(tensor for tensor in teacher if tensor is not None)]
    options = {"causal": work.causal}
    cost = costs.indexer_divergence(work, pairs, dtype)
    return Call(op, (case.student, case.teacher), options, inputs, case.leaves, cost)


def _logits(op: str, work: LogitsWorkload, pairs: int, dtype: torch.dtype, device: str) -> Call:
    case = logits_inputs(work, dtype, "kl", device)
    sides: tuple[Any, Any] = (case.student, case.teacher)
    inputs = [tensor for side in sides for tensor in side if tensor is not None]
    cost = costs.logits_divergence(work, pairs, dtype)
    return Call(op, sides, case.options, inputs, case.leaves, cost)


MAKERS: dict[str, tuple[Callable[..., Call], dict[str, Any]]] = {
    "attention_divergence": (_attention, ATTENTION),
    "attention_score_mse": (_attention, ATTENTION),
    "hidden_cosine": (_hidden, HIDDEN),
    "hidden_mse": (_hidden, HIDDEN),
    "hidden_normalized_mse": (_hidden, HIDDEN),
    "indexer_divergence": (_indexer, INDEXER),
    "logits_divergence": (_logits, LOGITS),
    "relation_divergence": (_attention, ATTENTION),
}


def make_call(
    op: str,
    workload: str,
    pairs: int,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    tokens: int | None = None,
    **options: Any,
) -> Call:
    """A call of an op on a workload with its batch for a GPU, or shrunk to so many tokens.

    Options are the op's own, beside those that the workload asks for.
    """
    maker, named = MAKERS[op]
    (work,) = on_device([named[workload]])
    if tokens is not None:
        work = shrunk(work, tokens)
        pairs = min(pairs, 2)
    call = maker(op, work, pairs, dtype, device)
    return call._replace(options={**call.options, **options})


def shrunk(work: Workload, tokens: int) -> Workload:
    """The same kind of workload for Triton's interpreter or a memory checker: one item of so many
    tokens, two heads or narrow states, few words."""
    if isinstance(work, AttentionWorkload):
        heads = tuple(max(1, 2 * count // work.heads) for count in work.kv_heads)
        return work._replace(batch=1, heads=2, kv_heads=heads, tokens=tokens)
    if isinstance(work, IndexerWorkload):
        kv_heads = max(1, 2 * work.kv_heads // work.heads)
        return work._replace(batch=1, index_heads=2, heads=2, kv_heads=kv_heads, tokens=tokens)
    if isinstance(work, HiddenWorkload):
        return work._replace(batch=1, tokens=tokens, widths=tuple(w // 8 for w in work.widths))
    return work._replace(tokens=tokens, widths=tuple(w // 16 for w in work.widths), vocabulary=300)
