"""The engine of one process against AdamW written out, and what it asks of the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.step_host import Ops
from fastkd.training.checkpoint.layout import WEIGHT, find_places
from fastkd.training.flat_weights import norm_of
from fastkd.training.local_engine import LocalEngine

STEPS, ROWS, WIDTH = 5, 8, 6
BETAS, EPS, RATE, DECAY = (0.9, 0.999), 1e-8, 0.05, 0.1


class Model(nn.Module):
    """A matrix with decay, a bias without, and a parameter that only some steps reach."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.rare = nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, rows: Tensor, reach: bool) -> Tensor:
        found = rows.to(self.matrix.dtype) @ self.matrix + self.bias
        return (found * self.rare if reach else found).square().mean()


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_engine(
    module: nn.Module,
    accumulation: int,
    max_grad_norm: float,
    bf16: bool,
    optimizer: torch.optim.AdamW | None = None,
) -> LocalEngine:
    if optimizer is None:
        optimizer = torch.optim.AdamW(_groups(module), lr=RATE, betas=BETAS, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return LocalEngine(
        module,
        optimizer,
        schedule,
        accumulation=accumulation,
        batch_size=ROWS,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
    )


def data_of(accumulation: int) -> list[list[tuple[Tensor, bool]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(ROWS, WIDTH, generator=generator), (step + number) % 2 == 0)
            for number in range(accumulation)
        ]
        for step in range(STEPS)
    ]


def run_by_hand(
    accumulation: int,
    max_grad_norm: float,
    bf16: bool,
    matrix_update: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """AdamW (arXiv 1711.05101) on fp64 masters; gradients are those of weights as they compute.

    With `matrix_update` matrices are updated otherwise: it moves their first moment by a gradient,
    both of which it is given, and returns what is subtracted at a rate of 1.
    """
    lower = Model().bfloat16() if bf16 else Model()
    masters = {name: p.detach().double() for name, p in lower.named_parameters()}
    first = {name: torch.zeros_like(m) for name, m in masters.items()}
    second = copy.deepcopy(first)
    for step, micro_batches in enumerate(data_of(accumulation)):
        total = {name: torch.zeros_like(m) for name, m in masters.items()}
        for rows, reach in micro_batches:
            loss = lower(rows, reach) / accumulation
            found = torch.autograd.grad(loss, list(lower.parameters()), allow_unused=True)
            for name, gradient in zip(masters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        norm = torch.stack([g.square().sum() for g in total.values()]).sum().sqrt()
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1) if max_grad_norm else 1.0
        rate = RATE / (1 + step)
        for name, master in masters.items():
            gradient = total[name] * clip
            master *= 1 - rate * (DECAY if master.ndim > 1 else 0)
            if matrix_update is not None and master.ndim > 1:
                master -= rate * matrix_update(first[name], gradient)
                continue
            first[name].lerp_(gradient, 1 - BETAS[0])
            second[name].lerp_(gradient.square(), 1 - BETAS[1])
            root = (second[name] / (1 - BETAS[1] ** (step + 1))).sqrt()
            master -= rate * first[name] / (1 - BETAS[0] ** (step + 1)) / (root + EPS)
        with torch.no_grad():
            for name, parameter in lower.named_parameters():
                parameter.copy_(masters[name])
    return masters


def run_steps(engine: LocalEngine, accumulation: int) -> None:
    for micro_batches in data_of(accumulation):
        for rows, reach in micro_batches:
            engine.backward(engine.module(rows, reach))
            engine.step()


def assert_weights(engine: LocalEngine, expected: dict[str, Tensor], tolerance: float) -> None:
    """The weights that are updated are near those expected, and the module computes with them."""
    places = find_places(engine, 0)
    for name, parameter in engine.module.named_parameters():
        place = places[parameter]
        weight = place.piece(place.tensors[WEIGHT]).view(parameter.shape)
        torch.testing.assert_close(weight.double(), expected[name], atol=tolerance, rtol=0)
        assert torch.equal(parameter, weight.to(parameter.dtype)), name


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_written_out(
    accumulation: int, max_grad_norm: float, bf16: bool, held: bool
) -> None:
    module = Model()
    engine = make_engine(module, accumulation, max_grad_norm, bf16)
    if held:
        engine.hold_gradients()
        gradients = [p.grad for p in module.parameters()]
    run_steps(engine, accumulation)
    expected = run_by_hand(accumulation, max_grad_norm, bf16)
    # a step is as long as the rate, whatever the gradient: rounding stays far below one
    assert_weights(engine, expected, 1e-5)
    assert engine.global_steps == STEPS and engine.global_samples == STEPS * ROWS
    assert engine.get_lr() == [RATE / (1 + STEPS)] * 2
    if held:
        assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_whose_gradient_is_not_finite_is_left_out(bf16: bool) -> None:
    engine = make_engine(Model(), 1, 1.0, bf16)
    run_steps(engine, 1)
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    engine.backward(engine.module(torch.full((ROWS, WIDTH), float("inf")), True))
    engine.step()
    assert engine.skipped_steps == 0
    assert not engine.get_global_grad_norm() < float("inf")
    assert engine.skipped_steps == 1
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    run_steps(engine, 1)
    assert engine.get_global_grad_norm() > 0 and engine.skipped_steps == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_the_norm_of_millions_of_numbers_is_exact(bf16: bool) -> None:
    # torch's own sum over all of them at once misses a hundredth
    layer = nn.Linear(16_000, 1000, bias=False)
    engine = make_engine(layer, 1, 0.0, bf16=bf16)
    engine.backward(0.1 * layer.weight.sum())
    engine.step()
    each = float(torch.tensor(0.1).bfloat16()) if bf16 else 0.1
    assert engine.get_global_grad_norm() == pytest.approx(each * 16e6**0.5, rel=1e-5)


def test_the_norm_of_tensors_of_any_size_is_of_all_their_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3,), (4096,), (4097,), (100, 99), (2, 4096))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    for tensors in (drawn, drawn[-1:]):
        numbers = torch.cat([tensor.double().flatten() for tensor in tensors])
        assert norm_of(tensors).item() == pytest.approx(numbers.norm().item(), rel=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_is_a_few_calls_and_reads_nothing(bf16: bool) -> None:
    module = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))
    engine = make_engine(module, 1, 1.0, bf16)
    # the first step makes states, later ones update them
    for _ in range(2):
        found = torch.stack([layer.weight.sum() + layer.bias.sum() for layer in module])
        engine.backward(found.sum())
        with Ops() as counting:
            engine.step()
    assert sum(counting.calls.values()) < 50, counting.calls
    assert "_local_scalar_dense" not in counting.calls
