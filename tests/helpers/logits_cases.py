"""Inputs of logits_divergence shared by its tests: heads or plain logits on either side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from conditioning import Change, check_rounding
from fastkd_kernels import LogitsDivergenceKind, LogitsHead, logits_divergence, reference
from kernel_cases import relative_error
from torch import Tensor

KINDS: tuple[str, ...] = get_args(LogitsDivergenceKind)
# student and teacher
FORMS = [("head", "head"), ("head", "logits"), ("logits", "head"), ("logits", "logits")]

Side = LogitsHead | Tensor
# a head's scale and soft cap
Finish = tuple[float, float | None]


@dataclass
class LogitsCase:
    """Both sides' logits or heads, and options of the op."""

    student: Side
    teacher: Side
    options: dict[str, Any]
    # of the upstream gradients, as a loss scale keeps those of fp16 above its smallest numbers
    gain: float = 1.0

    @property
    def leaves(self) -> list[Tensor]:
        return tensors_of(self.student)

    def with_leaves(self, leaves: Sequence[Tensor]) -> "LogitsCase":
        """The same case around another student, in the order of `leaves`."""
        return replace(self, student=made_of(self.student, leaves))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "LogitsCase":
        """Every tensor of both sides changed; the student's require grad."""
        leaves = [change(tensor.detach()).requires_grad_() for tensor in self.leaves]
        target = [change(tensor) for tensor in tensors_of(self.teacher)]
        return replace(self.with_leaves(leaves), teacher=made_of(self.teacher, target))

    def cast(self, dtype: torch.dtype) -> "LogitsCase":
        return self.mapped(lambda tensor: tensor.to(dtype))

    def on(self, device: str) -> "LogitsCase":
        made = self.mapped(lambda tensor: tensor.to(device))
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return replace(made, options=moved)

    def defined(self, change: Change) -> list[Tensor]:
        """What the definition gives from tensors that went through a change."""
        return self.mapped(change).run(reference.logits_divergence)

    def run(self, op: Callable[..., Any], **more: Any) -> list[Tensor]:
        """The losses, then the student's gradients for fixed, different upstream gradients."""
        made = op(self.student, self.teacher, **self.options, **more)
        losses = made if isinstance(made, tuple) else (made,)
        total = sum(factor * loss for factor, loss in zip((0.7, -1.3), losses, strict=False))
        gradients = torch.autograd.grad(self.gain * total, self.leaves)
        return [*(loss.detach() for loss in losses), *gradients]


def tensors_of(side: Side) -> list[Tensor]:
    if isinstance(side, Tensor):
        return [side]
    return [tensor for tensor in side[:3] if tensor is not None]


def made_of(side: Side, tensors: Sequence[Tensor]) -> Side:
    """A side like `side` of other tensors, in the order of `tensors_of`."""
    if isinstance(side, Tensor):
        return tensors[0]
    bias = tensors[2] if tensors[2:] else None
    return LogitsHead(tensors[0], tensors[1], bias, *side[3:])


def logits_case(
    lead: tuple[int, ...],
    forms: tuple[str, str],
    *,
    vocabularies: tuple[int, int] = (13, 12),
    widths: tuple[int, int] = (6, 4),
    biases: tuple[bool, bool] = (True, False),
    finishes: tuple[Finish, Finish] = ((1.0, None), (1.0, None)),
    masked: bool = True,
    labelled: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> LogitsCase:
    """Random sides with leading dimensions `lead`; about a third of the rows does not count."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "device": device}

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, **drawn).to(dtype)

    def side(index: int) -> Side:
        vocabulary, width = vocabularies[index], widths[index]
        if forms[index] == "logits":
            return made(*lead, vocabulary)
        bias = made(vocabulary) if biases[index] else None
        weight = made(vocabulary, width) * 2 / width**0.5
        return LogitsHead(made(*lead, width), weight, bias, *finishes[index])

    student, teacher = side(0), side(1)
    if masked:
        options["mask"] = torch.rand(lead, **drawn) > 0.3
    if labelled:
        labels = torch.randint(0, vocabularies[0], lead, **drawn)
        options["labels"] = labels.masked_fill(torch.rand(lead, **drawn) < 0.3, -100)
    return LogitsCase(student, teacher, options).mapped(lambda tensor: tensor)


def near_case(
    form: str, distance: float, rows: int = 40, seed: int = 1, **options: Any
) -> LogitsCase:
    """A student at a relative `distance` of its teacher, with 64 columns."""
    case = logits_case(
        (rows,),
        (form, form),
        vocabularies=(64, 64),
        widths=(32, 32),
        biases=(True, True),
        masked=False,
        seed=seed,
        **options,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    leaves = [
        (t + distance * torch.randn(t.shape, generator=generator, dtype=t.dtype)).requires_grad_()
        for t in tensors_of(case.teacher)
    ]
    return case.with_leaves(leaves)


def largest_error(given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(given, expected, strict=True))


def compared(case: LogitsCase, backend: str, device: str = "cpu") -> float:
    """Largest relative error of losses and gradients against the definition in fp64."""
    expected = case.cast(torch.float64).run(reference.logits_divergence)
    given = case.on(device).run(logits_divergence, backend=backend)
    return largest_error([value.cpu() for value in given], expected)


def check_precision(case: LogitsCase, backend: str, device: str = "cpu") -> None:
    """At most twice the error of plain PyTorch, or what rounding does to the definition."""
    case = replace(case, gain=2**10)
    plain = case.run(reference.logits_divergence)
    made = case.on(device).run(logits_divergence, backend=backend)
    assert made[0].dtype == torch.float32
    check_rounding(case.defined, [value.cpu() for value in made], plain=plain)
