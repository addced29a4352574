"""Divergence between the logits of two models, with the heads fused into the loss.

Liger-Kernel's road: the logits of a chunk of tokens are made, turned into the loss and at once into
the gradients of hidden states and weight, and forgotten. With hard labels the loss has two outputs,
whose upstream gradients only the backward knows, so the backward makes the logits once more. The
road not taken there: two unit gradients of the weight, which take its memory twice.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_logits, check_options, look_at_logits, resolve_backend
from ..common.autograd import Named, accumulator, inverse, planned, register
from ..common.plan import Plan, losses_in, plan_for
from ..common.remembered import remembered
from ..types import Backend, LogitsDivergenceKind, LogitsHead
from . import torch_path
from .torch_path import Divergence, Finish, Gradients


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
        student: A `LogitsHead`, perhaps with a scale and a soft cap, or logits
            `[batch, tokens, vocab]` or `[rows, vocab]`, finite, in bf16, fp16, fp32 or fp64.
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
        Tensors of inference mode may be read by the backward too, which can't tell whether they
        were written to meanwhile: leave them as they are until then.

    Raises:
        ValueError: shapes, devices, options that do not fit, or a teacher that requires grad.
        TypeError: something that is neither a head nor a float tensor, or no bool mask.
    """
    given = (student, teacher, mask, labels)
    options: Any = (kind, temperature, scale_by_temperature, beta, skew, backend)
    plan = plan_for(look_at_logits(*given, *options), partial(_checked_plan, *given, *options))
    values: Tensor | tuple[Tensor, Tensor] = plan(
        _tensors_of(student), _tensors_of(teacher), mask, labels
    )
    return values


def _tensors_of(side: LogitsHead | Tensor) -> list[Tensor]:
    """`[logits]`, `[hidden, weight]` or `[hidden, weight, bias]`."""
    return [side] if isinstance(side, Tensor) else [of for of in side[:3] if of is not None]


def _finish_of(side: LogitsHead | Tensor) -> Finish:
    if isinstance(side, Tensor):
        return Finish()
    return Finish(float(side.scale), math.inf if side.softcap is None else float(side.softcap))


def _checked_plan(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    kind: str,
    temperature: float,
    scale_by_temperature: bool,
    beta: float,
    skew: float,
    backend: str,
) -> Plan:
    """Losses of sides, mask and labels that look like those of this call, if all fits."""
    check_options(kind, temperature, scale_by_temperature, beta, skew)
    check_logits(student, teacher, kind, mask, labels)
    given = (_tensors_of(student), _tensors_of(teacher), mask, labels)
    sides = given[:2]
    states = sides[0][0]
    dtype = accumulator(*sides[0], *sides[1])
    chosen = resolve_backend(backend, states.device, dtype)
    shared = min(map(_vocabulary, sides))
    grad = torch.is_grad_enabled()
    read = _reader(states.ndim == 2, shared < _vocabulary(sides[1]), shared)
    lead = (1, *states.shape[:-1])[-2:]
    options = (
        _mixed_kind(kind, beta, skew),
        float(temperature),
        float(skew if kind == "skew_kl" else beta),
        float(temperature) ** 2 if scale_by_temperature else 1.0,
        shared,
        [*_finish_of(student), *_finish_of(teacher)],
        grad and states.requires_grad,
        grad and any([tensor.requires_grad for tensor in sides[0][1:]]),
        chosen,
    )
    what = ("inverse counts", lead, dtype)

    def arguments(*given: Any) -> tuple[Any, ...]:
        *sides, mask, labels = read(*given)

        def made() -> Tensor:
            return _inverse_counts(mask, labels, lead, dtype, sides[0][0].device)

        counts = remembered((mask, labels), what, sides[0][0].device, made)
        return *sides, mask, labels, counts, *options

    run = _logits.planned(arguments(*given))
    values_of = losses_in(lambda *given: run(arguments(*given))[0], states.dtype)
    if labels is None:
        return lambda *given: values_of(*given).view(())

    def pair(*given: Any) -> tuple[Tensor, Tensor]:
        values = values_of(*given)
        return values[0], values[1]

    return pair


def _reader(flat: bool, cut: bool, shared: int) -> Callable[..., tuple[Any, ...]]:
    """Gives tensors three dimensions where they are `flat`, and cuts the teacher's vocabulary."""

    def read(
        student: list[Tensor], teacher: list[Tensor], mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Any, ...]:
        if cut and len(teacher) == 1:
            teacher = [teacher[0][..., :shared]]
        elif cut:
            teacher = [teacher[0], *(tensor[:shared] for tensor in teacher[1:])]
        if flat:
            # a view is another object, of which nothing is remembered
            student, teacher = ([side[0][None], *side[1:]] for side in (student, teacher))
            mask, labels = (None if of is None else of[None] for of in (mask, labels))
        return student, teacher, mask, labels

    return read


def _inverse_counts(
    mask: Tensor | None,
    labels: Tensor | None,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`[1 or 2]`: one over the valid rows, and over those of them that have a label."""
    counts: list[Tensor | int] = [math.prod(lead) if mask is None else mask.sum()]
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


def _sweep(
    backend: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    factors: Tensor,
    how: Divergence,
    *needs: bool,
) -> Callable[..., tuple[Tensor, Gradients]]:
    """The plan of sums and gradients, from sides, mask, labels and factors."""
    if backend == "torch":
        rest: Any = (how, *needs)
        return lambda *tensors: torch_path.sweep(*tensors, *rest)
    # imported by the first call that needs Triton
    from .triton_path import sweep

    looks: Any = (mask is not None, labels is not None, factors.dtype, how, *needs)
    return sweep(student, teacher, *looks)


@planned
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
    finishes: Sequence[float],
    need_states: bool,
    need_weight: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses `[1 or 2]` and, without labels, the gradients of student states, weight and bias."""
    how = Divergence(
        kind,
        temperature,
        teacher_share,
        scale,
        shared,
        Finish(*finishes[:2]),
        Finish(*finishes[2:]),
    )
    needs = (need_states and labels is None, need_weight and labels is None)
    plan = _sweep(backend, student, teacher, mask, labels, inverse_counts, how, *needs)

    def run(
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        mask: Tensor | None,
        labels: Tensor | None,
        inverse_counts: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums, made = plan(student, teacher, mask, labels, inverse_counts)
        return sums * inverse_counts, *made

    return run


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


@planned
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
    finishes: Sequence[float],
    need_states: bool,
    need_weight: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Gradients of `factors` times the two sums, from logits made once more."""
    how = Divergence(
        kind,
        temperature,
        teacher_share,
        scale,
        shared,
        Finish(*finishes[:2]),
        Finish(*finishes[2:]),
    )
    needs = (need_states, need_weight)
    plan = _sweep(backend, student, teacher, mask, labels, factors, how, *needs)

    def run(
        factors: Tensor,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        mask: Tensor | None,
        labels: Tensor,
        *_: Any,
    ) -> Gradients:
        return plan(student, teacher, mask, labels, factors)[1]

    return run


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
