"""What holds for every op and every input: hypothesis draws them, the same ones in every run.

The Triton kernels, slow in the interpreter, see fewer and smaller problems than the PyTorch path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import isfunction
from random import Random

import fastkd_kernels
import pytest
import torch
from conditioning import SHARP, Change, bounds, distance
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from property_cases import Problem
from property_families import FAMILIES
from torch import Tensor

# a busy machine is no failure, and every run draws the same
ALWAYS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
GARBAGE = [1e4, float("inf"), float("nan")]


def upstream_of(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(problem.count(problem).shape, generator=generator, dtype=torch.float64)


def limits_of(problem: Problem, backend: str, upstream: Tensor) -> tuple[list[Tensor], list[float]]:
    """The definition's values, and what rounding may do to them."""

    def define(change: Change) -> list[Tensor]:
        return problem.mapped(change).run(upstream, definition=True, grams=True)

    given = [problem.student[0].new_zeros(()), *(leaf.detach() for leaf in problem.leaves)]
    half = given[0].dtype.itemsize == 2
    return bounds(
        define,
        [given[0].float() if half else given[0], *given[1:]],
        inputs=problem.op in ("hidden_cosine", "hidden_normalized_mse"),
        anew=backend == "triton" and problem.op in ("attention_divergence", "relation_divergence"),
        operands=problem.operands,
    )


def sizes_of(exact: list[Tensor]) -> list[float]:
    """What a bound is held against: the norm of a value, and of the largest beside it."""
    largest = max(float(value.norm()) for value in exact)
    return [float(value.norm()) + 0.1 * largest for value in exact]


def sharp(limit: float, size: float, dtype: torch.dtype) -> None:
    """Take another problem where rounding alone may do so much that the bound would say nothing.

    As many are checked: hypothesis goes on drawing, and fails where most have to be left out.
    """
    # a bound that is NaN is not left out: what is held against it fails
    assume(not limit > SHARP * size + torch.finfo(dtype).tiny)


def close(
    given: list[Tensor], expected: list[Tensor], exact: list[Tensor], limits: list[float]
) -> None:
    """No farther apart than both may lie from the definition."""
    sizes = sizes_of(exact)
    for one, other, limit, size in zip(given, expected, limits, sizes, strict=True):
        assert one.shape == other.shape
        sharp(limit, size, one.dtype)
        assert distance(one, other.double()) <= 2 * limit


def equals_the_definition(problem: Problem, backend: str) -> None:
    """As near to fp64 as rounding lets it be, or as plain PyTorch in the same precision, twice."""
    upstream = upstream_of(problem)
    found = problem.run(upstream, backend=backend)
    plain = problem.run(upstream, definition=True)
    exact, limits = limits_of(problem, backend, upstream)
    sizes = sizes_of(exact)
    for own, other, true, limit, size in zip(found, plain, exact, limits, sizes, strict=True):
        assert own.shape == true.shape
        sharp(limit, size, own.dtype)
        assert distance(own, true) <= max(2 * distance(other, true), limit)


def ignores_padding(problem: Problem, backend: str) -> None:
    upstream = upstream_of(problem)
    kept = problem.mask.shape[1]
    expected = problem.run(upstream, backend=backend)
    exact, limits = limits_of(problem, backend, upstream)
    for garbage in GARBAGE:
        loss, *grads = problem.padded(3, garbage).run(upstream, backend=backend)
        own = len(problem.student)
        for grad in grads[:own]:
            assert torch.count_nonzero(grad.narrow(problem.axis, kept, 3)) == 0
        cut = [grad.narrow(problem.axis, 0, kept) for grad in grads[:own]]
        close([loss, *cut, *grads[own:]], expected, exact, limits)


def adds_up_over_micro_batches(problem: Problem, backend: str) -> None:
    upstream = upstream_of(problem)
    whole = problem.run(upstream, backend=backend)
    total = problem.count(problem).clamp(min=1).to(whole[0])
    batch, own = problem.mask.shape[0], len(problem.student)
    parts = [problem.part(slice(item, item + 1)) for item in range(batch)]
    shares = [part.count(part).to(total) / total for part in parts]
    found = [
        part.run(upstream * share.double(), backend=backend)
        for part, share in zip(parts, shares, strict=True)
    ]
    loss = sum(one[0] * share for one, share in zip(found, shares, strict=True))
    states = [torch.cat([one[1 + i] for one in found]) for i in range(own)]
    weights = [
        torch.stack([one[1 + i] for one in found]).sum(0) for i in range(own, len(whole) - 1)
    ]
    close([loss, *states, *weights], whole, *limits_of(problem, backend, upstream))


def is_zero_without_valid_tokens(problem: Problem, backend: str) -> None:
    """Whatever the models made of padding, NaN included."""
    empty = replace(problem, mask=torch.zeros_like(problem.mask))
    broken = replace(
        empty,
        student=[torch.full_like(tensor, torch.nan) for tensor in problem.student],
        teacher=[torch.full_like(tensor, torch.nan) for tensor in problem.teacher],
    )
    for case in (empty, broken):
        for value in case.run(upstream_of(problem), backend=backend):
            assert torch.equal(value, torch.zeros_like(value))


def vanishes_at_the_teacher(problem: Problem, backend: str) -> None:
    """Student equal to teacher, judged by the gradients of a teacher that differs."""
    twin = problem.twin(problem)
    if twin is None:
        return
    other = replace(problem, labels=None).cast(torch.float64)
    upstream = upstream_of(other)
    size = max(float(value.norm()) for value in other.run(upstream, definition=True)[1:])
    loss, *grads = twin.run(upstream, backend=backend)
    # a projected student is rounded once more to be a teacher
    exact, limits = limits_of(twin, backend, upstream)
    if problem.arguments(problem)[1].get("kind") != "cross_entropy":
        assert float(loss.double().norm()) <= float(exact[0].norm()) + limits[0]
    for grad, true, limit in zip(grads, exact[1:], limits[1:], strict=True):
        sharp(limit, size, grads[0].dtype)
        assert float(grad.double().norm()) <= float(true.norm()) + limit


def leaves_inputs_alone(problem: Problem, backend: str) -> None:
    tensors = [*problem.leaves, *problem.teacher, *problem.frozen, problem.mask]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    problem.run(upstream_of(problem), backend=backend)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def repeats_bit_for_bit(problem: Problem, backend: str) -> None:
    upstream = upstream_of(problem)
    first = problem.run(upstream, backend=backend)
    assert all(map(torch.equal, first, problem.run(upstream, backend=backend)))


PROPERTIES: tuple[Callable[[Problem, str], None], ...] = (
    equals_the_definition,
    ignores_padding,
    adds_up_over_micro_batches,
    is_zero_without_valid_tokens,
    vanishes_at_the_teacher,
    leaves_inputs_alone,
    repeats_bit_for_bit,
)


def test_every_op_has_problems() -> None:
    ops = {name for name in fastkd_kernels.__all__ if isfunction(getattr(fastkd_kernels, name))}
    assert ops == set(FAMILIES)


@pytest.mark.parametrize("op", FAMILIES)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@settings(max_examples=20, **ALWAYS)
@given(draw=st.randoms(use_true_random=False))
def test_on_pytorch(op: str, holds: Callable[[Problem, str], None], draw: Random) -> None:
    problem = FAMILIES[op](draw, False)
    dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16])
    holds(problem.cast(dtype), "torch")


def on_triton(op: str, holds: Callable[[Problem, str], None], draw: Random) -> None:
    problem = FAMILIES[op](draw, True)
    dtype = draw.choice([torch.float64, torch.float32, torch.float16])
    holds(problem.cast(dtype), "triton")


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs in the interpreter: a GPU would compile every draw anew"
)
# numpy, which interprets, sees what is masked away
quietly = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@quietly
@interpreted
@pytest.mark.parametrize("op", FAMILIES)
@settings(max_examples=6, phases=[Phase.generate], **ALWAYS)
@given(draw=st.randoms(use_true_random=False))
def test_definition_on_triton(op: str, draw: Random) -> None:
    on_triton(op, equals_the_definition, draw)


@quietly
@interpreted
@pytest.mark.parametrize("op", FAMILIES)
@pytest.mark.parametrize("holds", PROPERTIES[1:], ids=lambda holds: holds.__name__)
@settings(max_examples=2, phases=[Phase.generate], **ALWAYS)
@given(draw=st.randoms(use_true_random=False))
def test_on_triton(op: str, holds: Callable[[Problem, str], None], draw: Random) -> None:
    on_triton(op, holds, draw)
