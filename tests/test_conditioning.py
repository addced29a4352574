"""The bounds of the kernel tests: wide enough for any order of a sum, too narrow for a fault."""

import pytest
import torch
from conditioning import Change, bounds, check_rounding, distance, plain_loss_error
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
LEFT = torch.randn(6, 200, generator=GENERATOR)
RIGHT = torch.randn(200, 5, generator=GENERATOR)


def define(change: Change) -> list[Tensor]:
    """Mean square of a product, and its gradient of the left factor."""
    left = change(LEFT).requires_grad_()
    loss = (left @ change(RIGHT)).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, left)]


def given(left: Tensor, order: Tensor) -> list[Tensor]:
    """The same in fp32, term after term in some order: the worst that an accumulator can do."""
    total = torch.zeros(6, 5)
    for term in order.tolist():
        total = total + left[:, term, None] * RIGHT[term]
    return [total.square().mean(), (2 / total.numel()) * total @ RIGHT.mT]


def test_every_order_of_a_sum_is_within_its_bound() -> None:
    for seed in range(20):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        check_rounding(define, given(LEFT, order))


def test_one_lost_term_of_many_is_not() -> None:
    with pytest.raises(AssertionError, match=r"output 0: .* above"):
        check_rounding(define, given(LEFT, torch.arange(199)))
    with pytest.raises(AssertionError, match=r"output 0: .* above"):
        check_rounding(define, given(1.00001 * LEFT, torch.arange(200)))


def test_bounds_are_the_same_every_time_and_small() -> None:
    values = given(LEFT, torch.arange(200))
    exact, limits = bounds(define, values)
    assert bounds(define, values)[1] == limits
    for true, limit in zip(exact, limits, strict=True):
        assert 0 < limit < 1e-5 * float(true.norm())


def test_nan_is_beyond_every_bound() -> None:
    values = given(LEFT, torch.arange(200))
    with pytest.raises(AssertionError, match="output 1: nan"):
        check_rounding(define, [values[0], torch.full_like(values[1], torch.nan)])


def test_a_bound_that_bounds_nothing_is_an_error() -> None:
    """A difference of two products that are all but equal has no digits in fp32."""

    def cancelled(change: Change) -> list[Tensor]:
        left = change(LEFT).requires_grad_()
        loss = (left @ change(RIGHT) - (LEFT.double() + 1e-9) @ RIGHT.double()).sum()
        return [loss.detach(), *torch.autograd.grad(loss, left)]

    with pytest.raises(AssertionError, match="bounds nothing"):
        check_rounding(cancelled, [torch.zeros(()), torch.zeros(6, 200)])


def test_a_softmax_rounded_plainly_loses_what_is_of_second_order() -> None:
    scores = torch.randn(8, 40, generator=GENERATOR)
    other = scores + 1e-3 * torch.randn(8, 40, generator=GENERATOR)

    def divergence(change: Change) -> list[Tensor]:
        own = change(scores).requires_grad_()
        log_p, log_t = own.log_softmax(-1), change(other).log_softmax(-1)
        loss = (log_t.exp() * (log_t - log_p)).sum()
        return [loss.detach(), *torch.autograd.grad(loss, own)]

    exact, limits = bounds(divergence, [torch.zeros(()), torch.zeros(8, 40)])
    assert plain_loss_error(divergence) > 5 * limits[0]
    assert distance(exact[0], exact[0]) == 0
