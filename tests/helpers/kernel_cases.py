"""Inputs, errors and memory readings shared by the kernel tests."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from conditioning import Change, Define
from fastkd_kernels import AttentionState, reference
from fastkd_kernels.types import TeacherLayers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def attention_states(
    pairs: int,
    batch: int,
    heads: int,
    tokens: int,
    dims: tuple[int, int],
    *,
    kv_heads: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[list[AttentionState], list[AttentionState]]:
    """Random student (requires grad) and teacher states."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for dim, kv in zip(dims, kv_heads or (heads, heads), strict=True):
        sides.append(
            [
                AttentionState(
                    torch.randn(batch, heads, tokens, dim, generator=generator).to(device, dtype),
                    torch.randn(batch, kv, tokens, dim, generator=generator).to(device, dtype),
                    None,
                    dim**-0.5,
                )
                for _ in range(pairs)
            ]
        )
    return trained(sides[0]), sides[1]


def trained(states: Sequence[AttentionState]) -> list[AttentionState]:
    """The same values as leaves that require grad."""
    return [
        state._replace(
            query=state.query.detach().requires_grad_(), key=state.key.detach().requires_grad_()
        )
        for state in states
    ]


def cast(states: Sequence[AttentionState], dtype: torch.dtype) -> list[AttentionState]:
    return [
        state._replace(query=state.query.detach().to(dtype), key=state.key.detach().to(dtype))
        for state in states
    ]


def near(teacher: Sequence[AttentionState], distance: float, seed: int = 1) -> list[AttentionState]:
    """Students at a relative `distance` of the teacher."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + distance * noise

    return [t._replace(query=moved(t.query), key=moved(t.key)) for t in teacher]


def leaves_of(states: Sequence[AttentionState]) -> list[Tensor]:
    return [tensor for state in states for tensor in (state.query, state.key)]


def defined_states(definition: Callable[..., Tensor], states: Any, **options: Any) -> Define:
    """Losses and gradients of a definition from queries and keys that went through a change."""

    def define(change: Change) -> list[Tensor]:
        own, target = (
            [s._replace(query=change(s.query), key=change(s.key)) for s in side] for side in states
        )
        own = trained(own)
        return loss_and_gradients(definition, leaves_of(own), own, target, **options)

    return define


def gram_form(
    student: Sequence[AttentionState],
    teacher: Sequence[TeacherLayers],
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    reduction: str = "valid",
    chunk: int = 128,
) -> Tensor:
    """attention_score_mse by Grams of both models side by side: the definition where all is exact,
    and where products are rounded, what the plain Gram form loses by terms that cancel."""
    losses = []
    for own, target in zip(student, teacher, strict=True):
        layers = [target] if isinstance(target, AttentionState) else list(target)
        heads, tokens = own.query.shape[1:3]
        parts = [(own.scale, own), *((-t.scale / len(layers), t) for t in layers)]
        x = torch.cat([scale * state.query for scale, state in parts], -1)
        y = torch.cat(
            [s.key.repeat_interleave(heads // s.key.shape[1], dim=1) for _, s in parts], -1
        )
        entries = torch.ones(len(x), 1, tokens, tokens, dtype=torch.bool, device=x.device)
        if query_mask is not None and reduction == "valid":
            x = x * query_mask[:, None, :, None]
            entries = entries & query_mask[:, None, :, None]
        if key_mask is not None:
            y = y * key_mask[:, None, :, None]
            entries = entries & key_mask[:, None, None, :]
        entries = entries.tril() if causal else entries
        size = chunk if causal else tokens
        total = x.new_zeros(())
        for start in range(0, tokens, size):
            rows = x[:, :, start : start + size]
            if causal:
                tile = rows @ y[:, :, start : start + size].mT
                total = total + tile.tril().square().sum()
            seen = y[:, :, : start if causal else tokens]
            grams = [(side.mT @ side).flatten(-2) for side in (rows, seen)]
            total = total + (grams[0][..., None, :] @ grams[1][..., None]).sum()
        count = heads * entries.sum() if reduction == "valid" else len(x) * heads * tokens**2
        losses.append(total / max(int(count), 1))
    return torch.stack(losses)


def defined_score_mse(states: Any, algorithm: str = "tiles", **options: Any) -> Define:
    """attention_score_mse as it is rounded: by Grams that cancel where head sizes differ, and by
    scores otherwise, whose difference a Gram of one head size takes first."""
    sizes = {state.query.shape[-1] for side in states for state in side}
    grams = algorithm == "gram" and len(sizes) > 1
    return defined_states(gram_form if grams else reference.attention_score_mse, states, **options)


def masks(batch: int, tokens: int, seed: int = 2) -> Tensor:
    """Right padding of different lengths, the last item without any valid token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    if batch > 2:
        lengths[-1] = 0
    return torch.arange(tokens)[None, :] < lengths[:, None]


def loss_and_gradients(
    op: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    *args: Any,
    seed: int = 3,
    gain: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """The losses, then the gradients of `leaves` for a random upstream gradient.

    `gain` scales that, as a loss scale keeps the gradients of fp16 above its smallest numbers.
    """
    loss = op(*args, **options)
    generator = torch.Generator().manual_seed(seed)
    upstream = gain * torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected` (absolute where that is 0).

    Infinite where either is NaN, which `max` over several errors would pass over.
    """
    exact = expected.double()
    scale = exact.norm().item()
    error = (given.double() - exact).norm().item() / (scale or 1.0)
    return math.inf if math.isnan(error) else error


def errors(given: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(given, expected, strict=True)]


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that torch held on the CPU at once, beyond what it held before `function`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()
    del kept
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def fresh_tensors_are_nan() -> Iterator[None]:
    """Deterministic mode, in which an output that nobody writes shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, counts: dict[str, int], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.kernel[grid]


@dataclass
class HiddenCase:
    """Hidden states of both models and what projects them."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: str
    trained: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        found = list(self.student)
        for value in self.trained.values():
            found += [value] if isinstance(value, Tensor) else value
        return found

    def with_leaves(self, leaves: Sequence[Tensor]) -> "HiddenCase":
        """The same case around other tensors, in the order of `leaves`."""
        rest = list(leaves[len(self.student) :])
        made: dict[str, Any] = {}
        for name, value in self.trained.items():
            count = 1 if isinstance(value, Tensor) else len(value)
            taken, rest = rest[:count], rest[count:]
            made[name] = taken[0] if isinstance(value, Tensor) else taken
        return HiddenCase(list(leaves[: len(self.student)]), self.teacher, self.weights, made)

    def mapped(self, change: Change) -> "HiddenCase":
        """Every tensor changed; those of the student are leaves."""
        made = self.with_leaves([change(leaf.detach()).requires_grad_() for leaf in self.leaves])
        made.teacher = [change(tensor) for tensor in self.teacher]
        return made

    def cast(self, dtype: torch.dtype) -> "HiddenCase":
        return self.mapped(lambda tensor: tensor.to(dtype))

    def on(self, device: str) -> "HiddenCase":
        return self.mapped(lambda tensor: tensor.to(device))

    def exact(self) -> "HiddenCase":
        return self.cast(torch.float64)

    def run(self, op: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        """Losses and gradients."""
        return loss_and_gradients(
            op, self.leaves, self.student, self.teacher, **self.trained, **options
        )

    def defined(self, definition: Callable[..., Tensor], **options: Any) -> Define:
        """Losses and gradients of a definition from tensors that went through a change."""
        return lambda change: self.mapped(change).run(definition, **options)

    def near(self, distance: float, seed: int = 1) -> "HiddenCase":
        """Teachers at a relative `distance` of the projected students."""
        generator = torch.Generator().manual_seed(seed)
        made = self.with_leaves(self.leaves)
        with torch.no_grad():
            noise = [torch.randn(t.shape, generator=generator).to(t) for t in self.teacher]
            made.teacher = []
            for pair, own in enumerate(self.student):
                value = own
                for name in self.trained:
                    given = self.trained[name]
                    tensor = given if isinstance(given, Tensor) else given[pair]
                    value = value @ tensor.mT if name == "weight" else value + tensor
                made.teacher.append(value + distance * noise[pair])
        return made


def hidden_case(
    pairs: int,
    batch: int,
    tokens: int,
    widths: tuple[int, int],
    weights: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> HiddenCase:
    """Random hidden states; `weights` is "none", "shared" or "each", with "+bias" if wanted."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def trained(*shape: int) -> Any:
        if weights.startswith("shared"):
            return made(*shape).requires_grad_()
        return [made(*shape).requires_grad_() for _ in range(pairs)]

    arguments = {}
    if weights != "none":
        arguments["weight"] = trained(widths[1], widths[0])
    if weights.endswith("+bias"):
        arguments["bias"] = trained(widths[1])
    student = [made(batch, tokens, widths[0]).requires_grad_() for _ in range(pairs)]
    teacher = [made(batch, tokens, widths[1]) for _ in range(pairs)]
    return HiddenCase(student, teacher, weights, arguments)
