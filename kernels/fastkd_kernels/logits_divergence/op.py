"""Divergence between the logits of two models, with the heads fused into the loss.

Liger-Kernel's road: the logits of a chunk of tokens are made, turned into the loss and at once into
the gradients of hidden states and weight, and forgotten. With hard labels the loss has two outputs,
whose upstream gradients only the backward knows, so the backward makes the logits once more. The
road not taken there: two unit gradients of the weight, which take its memory twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_logits, check_options, resolve_backend
from ..common.autograd import Named, accumulator, inverse, register
from ..common.remembered import remembered
from ..types import Backend, LogitsDivergenceKind, LogitsHead
from . import torch_path
from .torch_path import Divergence, Gradients


def logits_divergence(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    *,
    kind: LogitsDivergenceKind = "kl",
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean divergence of the student's next-token (or class) distribution over valid rows.

    With `t` the teacher's and `p` the student's probabilities at `temperature`, one row adds

    * "kl": `sum t log(t/p)` (arXiv 1503.02531, section 2, up to the teacher's entropy);
    * "reverse_kl": `sum p log(p/t)` (MiniLLM, arXiv 2306.08543);
    * "js": `beta KL(t|m) + (1 - beta) KL(p|m)`, `m = beta t + (1 - beta) p` (GKD, arXiv 2306.13649,
      the generalised Jensen-Shannon divergence of section 2); as there, 0 is "kl", to which
      `js / beta` tends, and 1 "reverse_kl", to which `js / (1 - beta)` tends;
    * "skew_kl": `KL(t|m)`, `m = skew t + (1 - skew) p` (DistiLLM, arXiv 2402.03898, section 3.1),
      which is "kl" where `skew` is 0;
    * "cross_entropy": `-sum t log p` (TinyBERT, arXiv 1909.10351, eq. 10);
    * "mse": the squared difference of raw logits, a mean over the vocabulary, not a sum.

    Args:
        student: A `LogitsHead` or logits `[batch, tokens, vocab]` or `[rows, vocab]`, finite, in
            bf16, fp16, fp32 or fp64.
        teacher: The same, of other width or vocabulary if need be; either side may be plain logits.
            Vocabularies of different sizes are cut to the shared prefix.
        kind: The divergence.
        temperature: Divides the logits of both sides, from 0.001 to 1000. "mse" compares raw logits
            and takes 1 only.
        scale_by_temperature: Multiply the divergence by `temperature**2`, which keeps the size of
            its gradient (arXiv 1503.02531, section 2).
        beta: The teacher's part of the mixture of "js": from 0.0001 to 0.9999, or an end, 0 or 1.
        skew: The teacher's part of the mixture of "skew_kl": 0, or from 0.0001 to 0.9999.
        mask: Bool, True at valid rows, with the leading dimensions of the logits; None counts all.
        labels: int64 with the leading dimensions of the logits; -100 is not counted. A label
            outside the student's vocabulary makes cross-entropy and gradients NaN.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        A scalar in fp32 (fp64 where the student is fp64). With `labels` a pair: the divergence, and
        the cross-entropy of the student's whole vocabulary at temperature 1, each a mean over its
        own valid rows. Gradients reach the student's hidden states, weight and bias, or logits.
        Without any valid row the loss and its gradients are 0.

    Raises:
        ValueError: shapes, devices, options that do not fit, or a teacher that requires grad.
        TypeError: something that is neither a head nor a float tensor, or no bool mask.
    """
    check_options(kind, temperature, beta, skew)
    teacher_share = float(skew if kind == "skew_kl" else beta)
    student_side, teacher_side = check_logits(student, teacher, kind, mask, labels)
    device = student_side[0].device
    dtype = accumulator(*student_side, *teacher_side)
    chosen = resolve_backend(backend, device, dtype)
    lead = student_side[0].shape[:2]
    # a view is another object, of which nothing is remembered
    if mask is not None and mask.shape != lead:
        mask = mask.view(lead)
    if labels is not None and labels.shape != lead:
        labels = labels.view(lead)
    shared = min(_vocabulary(student_side), _vocabulary(teacher_side))
    if len(teacher_side) == 1:
        teacher_side = [teacher_side[0][..., :shared]]
    else:
        teacher_side = [teacher_side[0], *(tensor[:shared] for tensor in teacher_side[1:])]
    grad = torch.is_grad_enabled()
    values: Tensor = _logits(
        student_side,
        teacher_side,
        mask,
        labels,
        remembered(
            (mask, labels),
            ("inverse counts", lead, dtype),
            device,
            lambda: _inverse_counts(mask, labels, lead, dtype, device),
        ),
        _mixed_kind(kind, beta, skew),
        float(temperature),
        teacher_share,
        float(temperature) ** 2 if scale_by_temperature else 1.0,
        shared,
        grad and student_side[0].requires_grad,
        grad and any(tensor.requires_grad for tensor in student_side[1:]),
        chosen,
    )[0]
    if student_side[0].dtype != torch.float64:
        values = values.float()
    return values[0] if labels is None else (values[0], values[1])


def _inverse_counts(
    mask: Tensor | None,
    labels: Tensor | None,
    lead: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`[1 or 2]`: one over the valid rows, and over those of them that have a label."""
    counts: list[Tensor | int] = [lead.numel() if mask is None else mask.sum()]
    if labels is not None:
        counted = labels != -100
        counts.append((counted if mask is None else counted & mask).sum())
    return torch.stack([inverse(count, dtype, device) for count in counts])


def _mixed_kind(kind: str, beta: float, skew: float) -> str:
    """`kind`, or the divergence that it becomes where one model has no part in the mixture."""
    if kind == "js" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "kl"
    return "kl" if kind == "skew_kl" and skew == 0.0 else kind


def _vocabulary(side: Sequence[Tensor]) -> int:
    return side[1].shape[0] if side[1:] else side[0].shape[-1]


def _sweep(backend: str, *arguments: Any) -> tuple[Tensor, Gradients]:
    if backend == "torch":
        return torch_path.sweep(*arguments)
    # imported by the first call that needs Triton
    from .triton_path import sweep

    return sweep(*arguments)


def _forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    inverse_counts: Tensor,
    kind: str,
    temperature: float,
    teacher_share: float,
    scale: float,
    shared: int,
    need_states: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[1 or 2]` and, without labels, the gradients of student states, weight and bias."""
    how = Divergence(kind, temperature, teacher_share, scale, shared)
    needs = (need_states and labels is None, need_weight and labels is None)
    sums, made = _sweep(backend, student, teacher, mask, labels, inverse_counts, how, *needs)
    return sums * inverse_counts, *made


def _fake(given: Named) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (given.need_states, given.need_weight) if given.labels is None else (False, False)
    counts = given.inverse_counts
    return torch.empty_like(counts), *_empty(given.student, counts, *needs)


def _empty(
    student: Sequence[Tensor], like: Tensor, need_states: bool, need_weight: bool
) -> Gradients:
    shapes = [
        tuple(student[index].shape) if needed and student[index:] else (0,)
        for index, needed in enumerate((need_states, need_weight, need_weight))
    ]
    return Gradients(*(like.new_empty(shape) for shape in shapes))


def _backward(
    factors: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor,
    kind: str,
    temperature: float,
    teacher_share: float,
    scale: float,
    shared: int,
    need_states: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `factors` times the two sums, from logits made once more."""
    how = Divergence(kind, temperature, teacher_share, scale, shared)
    needs = (need_states, need_weight)
    return _sweep(backend, student, teacher, mask, labels, factors, how, *needs)[1]


def _backward_fake(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(given.student, given.factors, given.need_states, given.need_weight)


_registered_backward = register("logits_divergence_backward", _backward, _backward_fake)


def _keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    kept: dict[str, Any] = {"labels": given.labels}
    if given.labels is not None:
        kept = dict(vars(given))
    return kept | {"units": made[1:], "dtypes": [tensor.dtype for tensor in given.student]}


def _gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    inputs = vars(kept)
    made, dtypes = inputs.pop("units"), inputs.pop("dtypes")
    factor: Tensor | None = upstream
    if kept.labels is not None:
        made = _registered_backward(upstream * inputs.pop("inverse_counts"), **inputs)
        factor = None
    grads = [
        None if not unit.numel() else (unit if factor is None else unit * factor).to(dtype)
        for unit, dtype in zip(made, dtypes, strict=False)
    ]
    return {"student": grads}


_logits = register("logits_divergence", _forward, _fake, _keep, _gradient)
