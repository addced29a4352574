"""Gradients that are differentiated: right by the upstream gradient, refused by what ops are given.

And derivatives in forward mode, which are refused.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import fastkd_kernels
import pytest
import torch
from fastkd_kernels import reference
from indexer_cases import indexer_case
from kernel_cases import attention_states, hidden_case, leaves_of
from logits_cases import logits_case
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ["triton"] if CUDA else ["torch", "triton"]
BATCH, TOKENS = 2, 6
DTYPE = torch.float32
NO_SECOND = "no second derivative by what it was given: .* fastkd_kernels.reference$"
NO_FORWARD = r"no derivative in forward mode .* with a tangent: use backward$"


class Problem(NamedTuple):
    """An op's arguments around tensors in the place of `leaves`; `how` is not the definition's."""

    op: str
    leaves: list[Tensor]
    given: Callable[[list[Tensor]], tuple[Any, Any, dict[str, Any]]]
    how: dict[str, Any]

    def losses(self, leaves: list[Tensor], backend: str | None) -> Tensor:
        """`[losses]` of the op, or of its definition without a back end."""
        student, teacher, options = self.given(leaves)
        if backend is None:
            made = getattr(reference, self.op)(student, teacher, **options)
        else:
            options = {**options, **self.how, "backend": backend}
            made = getattr(fastkd_kernels, self.op)(student, teacher, **options)
        return torch.stack(made) if isinstance(made, tuple) else made.view(-1)


def attention(op: str, **how: Any) -> Problem:
    student, teacher = attention_states(2, BATCH, 2, TOKENS, (3, 5), dtype=DTYPE, device=DEVICE)

    def given(leaves: list[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        states = [
            state._replace(query=leaves[2 * pair], key=leaves[2 * pair + 1])
            for pair, state in enumerate(student)
        ]
        return states, teacher, {"query_mask": mask()}

    return Problem(op, leaves_of(student), given, how)


def hidden(op: str, weights: str, width: int = 3) -> Problem:
    case = hidden_case(2, BATCH, TOKENS, (width, 5), weights, DTYPE).on(DEVICE)

    def given(leaves: list[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        made = case.with_leaves(leaves)
        return made.student, made.teacher, {**made.trained, "mask": mask()}

    return Problem(op, case.leaves, given, {})


def logits(labelled: bool) -> Problem:
    options: dict[str, Any] = {"masked": False, "labelled": labelled, "dtype": DTYPE}
    case = logits_case((BATCH, TOKENS), ("head", "head"), **options).on(DEVICE)

    def given(leaves: list[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        made = case.with_leaves(leaves)
        return made.student, made.teacher, {**made.options, "mask": mask()}

    return Problem("logits_divergence", case.leaves, given, {})


def indexer() -> Problem:
    case = indexer_case(2, BATCH, TOKENS, (3, 5), dtype=DTYPE, device=DEVICE)

    def given(leaves: list[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        student = [
            type(state)(*leaves[3 * pair : 3 * pair + 3]) for pair, state in enumerate(case.student)
        ]
        return student, case.teacher, {"query_mask": mask()}

    return Problem("indexer_divergence", case.leaves, given, {})


def mask() -> Tensor:
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    valid[1, 4:] = False
    return valid


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tiles": partial(attention, "attention_score_mse", algorithm="tiles"),
    "gram": partial(attention, "attention_score_mse", algorithm="gram"),
    "divergence": partial(attention, "attention_divergence"),
    "hidden": partial(hidden, "hidden_mse", "shared+bias"),
    # more columns than rows, whose row gradients the backward multiplies
    "wide hidden": partial(hidden, "hidden_mse", "each+bias", width=16),
    "cosine": partial(hidden, "hidden_cosine", "shared"),
    "logits": partial(logits, labelled=False),
    "labelled logits": partial(logits, labelled=True),
    "indexer": indexer,
}

EVERY = pytest.mark.parametrize("name", PROBLEMS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# a mode sends calls through the registered op
ROUTES = pytest.mark.parametrize("dispatched", [False, True], ids=["eager", "dispatched"])


@EVERY
@EVERY_BACKEND
def test_gradients_are_right_by_their_upstream_gradient(name: str, backend: str) -> None:
    """As of a learned weight of the losses, whose gradients' size is to be as others'."""
    problem = PROBLEMS[name]()
    found = []
    for side in (None, backend):
        weights = torch.tensor([0.7, -1.3], device=DEVICE, requires_grad=True)
        losses = problem.losses(problem.leaves, side)
        total = (weights[: len(losses)] * losses).sum()
        gradients = torch.autograd.grad(total, problem.leaves, create_graph=True)
        size = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(size, weights)[0])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


@EVERY
@EVERY_BACKEND
@ROUTES
def test_a_penalty_on_gradients_is_refused(name: str, backend: str, dispatched: bool) -> None:
    """Never left out of a total, by whichever tensor that was trained."""
    problem = PROBLEMS[name]()
    with FlopCounterMode(display=False) if dispatched else torch.enable_grad():
        loss = problem.losses(problem.leaves, backend).sum()
    gradients = torch.autograd.grad(loss, problem.leaves, create_graph=True)
    for leaf in problem.leaves:
        for gradient in gradients:
            assert gradient.requires_grad
            total = loss + gradient.square().sum()
            with pytest.raises(NotImplementedError, match=NO_SECOND):
                torch.autograd.grad(total, leaf, retain_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        gradients[0].sum().backward()
    # what was not asked for is there
    again = torch.autograd.grad(loss, problem.leaves)
    assert all(map(torch.equal, again, gradients))


def test_a_hessian_is_refused() -> None:
    states, teacher = torch.randn(2, 1, 2, 3, device=DEVICE)

    def loss(states: Tensor) -> Tensor:
        return fastkd_kernels.hidden_mse([states], [teacher]).sum()

    with pytest.raises(NotImplementedError, match=NO_SECOND):
        torch.autograd.functional.hessian(loss, states)


def test_third_derivatives_are_refused_too() -> None:
    problem = PROBLEMS["tiles"]()
    upstream = torch.ones(2, device=DEVICE, requires_grad=True)
    losses = problem.losses(problem.leaves, BACKENDS[0])
    gradients = torch.autograd.grad(losses, problem.leaves, upstream, create_graph=True)
    size = sum(gradient.square().sum() for gradient in gradients)
    (by_upstream,) = torch.autograd.grad(size, upstream, create_graph=True)
    # a square of the upstream gradient
    (again,) = torch.autograd.grad(by_upstream.sum(), upstream, retain_graph=True)
    torch.testing.assert_close(again, by_upstream.detach())
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        torch.autograd.grad(by_upstream.sum(), problem.leaves[0])


def test_losses_that_are_changed_in_place_keep_their_gradients() -> None:
    problem = PROBLEMS["tiles"]()
    expected = torch.autograd.grad(
        problem.losses(problem.leaves, BACKENDS[0]).sum(), problem.leaves
    )
    losses = problem.losses(problem.leaves, BACKENDS[0])
    losses *= 2
    found = torch.autograd.grad(losses.sum(), problem.leaves)
    assert all(map(torch.equal, found, [2 * gradient for gradient in expected]))


@pytest.mark.skipif(CUDA, reason="the same graph as on the CPU")
def test_a_compiled_call_refuses_second_derivatives() -> None:
    """By torch itself."""
    problem = PROBLEMS["tiles"]()
    compiled = torch.compile(
        lambda *leaves: problem.losses(list(leaves), "torch"), backend="aot_eager"
    )
    loss = compiled(*problem.leaves).sum()
    gradients = torch.autograd.grad(loss, problem.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not currently support double backward"):
        (loss + gradients[0].square().sum()).backward()


def in_dual_level(problem: Problem, backend: str, trained: bool) -> None:
    leaves = [leaf.detach().requires_grad_(trained) for leaf in problem.leaves]
    with forward_ad.dual_level():
        # of one of them alone
        leaves[-1] = forward_ad.make_dual(leaves[-1], torch.ones_like(leaves[-1]))
        problem.losses(leaves, backend)


def by_transform(problem: Problem, backend: str, trained: bool) -> None:
    leaves = [leaf.detach() for leaf in problem.leaves]
    tangents = [*map(torch.ones_like, leaves)]
    torch.func.jvp(lambda *given: problem.losses([*given], backend), (*leaves,), (*tangents,))


@EVERY
@EVERY_BACKEND
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("derive", [in_dual_level, by_transform])
def test_derivatives_in_forward_mode_are_refused(
    derive: Callable[..., None], trained: bool, name: str, backend: str
) -> None:
    """Never zero without a word, before and after the call has its plan."""
    problem = PROBLEMS[name]()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=NO_FORWARD):
            derive(problem, backend, trained)
        problem.losses(problem.leaves, backend)


@EVERY_BACKEND
def test_calls_without_tangents_run_beside_those_that_have_some(backend: str) -> None:
    problem = PROBLEMS["tiles"]()
    expected = problem.losses(problem.leaves, backend)
    with forward_ad.dual_level():
        other = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        found = problem.losses(problem.leaves, backend)
        gradients = torch.autograd.grad(found.sum(), problem.leaves)
        assert forward_ad.unpack_dual(other).tangent is not None
    assert torch.equal(found, expected)
    again = torch.autograd.grad(expected.sum(), problem.leaves)
    assert all(map(torch.equal, gradients, again))
