"""Muon against its definition in fp64, and that ranks and stages change nothing of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_local_engine import (
    BETAS,
    DECAY,
    RATE,
    ROWS,
    STEPS,
    Model,
    assert_weights,
    make_engine,
    run_by_hand,
    run_steps,
)
from tiny_models import tiny_model
from tiny_runs import assert_same_run, keys, make_recipe, run_variants
from torch import Tensor
from transformers import AutoModel, GptOssConfig

from fastkd.capture.blocks import find_blocks
from fastkd.errors import UserError
from fastkd.recipe import Train, load_recipe
from fastkd.training import muon
from fastkd.training.checkpoint.states import read_state
from fastkd.training.deepspeed_config import deepspeed_of_student
from fastkd.training.local_engine import LocalEngine
from fastkd.training.muon import Muon, block_matrices, orthogonal
from fastkd.training.optimizer import make_optimizer, parameter_groups


def by_hand(update: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps (Jordan et al. 2024), times 0.2 sqrt(max(rows, columns))."""
    made = update.double() / update.double().norm()
    for _ in range(5):
        left = made @ made.mT
        made = 3.4445 * made - 4.7750 * left @ made + 2.0315 * left @ left @ made
    return 0.2 * math.sqrt(max(update.shape)) * made


@pytest.mark.parametrize("shape", [(20, 37), (37, 20), (24, 24), (1, 9), (64, 3)])
def test_an_update_is_the_one_written_out(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator) * 1e-3
    found = orthogonal(update)
    torch.testing.assert_close(found.double(), by_hand(update), rtol=0, atol=1e-4)
    size = 0.2 * math.sqrt(max(shape))
    values = torch.linalg.svdvals(found) / size
    assert values.min() > 0.3 and values.max() < 1.3
    # about as large as one of AdamW
    assert 0.1 < found.square().mean().sqrt() < 0.3
    assert not orthogonal(torch.zeros(shape)).any()


def test_steps_are_torchs_up_to_its_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator)
    ours, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    groups = [{"params": [ours], "weight_decay": DECAY, "muon": True}]
    optimizers = (
        Muon(groups, lr=RATE, betas=BETAS),
        torch.optim.Muon(
            [plain], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw", momentum=0.95
        ),
    )
    for _ in range(4):
        gradient = torch.randn(24, 40, generator=generator)
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    difference = (ours - plain).norm() / (ours - weight).norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("broken", [0.0, 1.0])
def test_matrices_of_one_shape_are_updated_at_once(
    broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12)] * 5 + [(12, 8)] * 2 + [(4, 4)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    made = []
    # each by itself, three of a kind at most, all
    for numbers in (0, 3 * 96, 1 << 20):
        monkeypatch.setattr(muon, "_together", lambda device, numbers=numbers: numbers)
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        groups = [{"params": parameters, "weight_decay": DECAY, "muon": True}]
        optimizer: Any = Muon(groups, lr=RATE, betas=BETAS)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(broken), torch.tensor(2.0)
        for factor in (1.0, -0.5):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = factor * gradient
            optimizer.step()
        made.append([*parameters, *(optimizer.state[p]["momentum"] for p in parameters)])
    for other in made[1:]:
        for one, same in zip(made[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)
    unmoved = all(map(torch.equal, made[0], weights))
    assert unmoved == bool(broken)


def engine_of(module: Model, accumulation: int, max_grad_norm: float, bf16: bool) -> LocalEngine:
    matrix, bias, rare = module.parameters()
    groups = [
        {"params": [matrix], "weight_decay": DECAY, "muon": True},
        {"params": [bias, rare], "weight_decay": 0.0, "muon": False},
    ]
    optimizer = Muon(groups, lr=RATE, betas=BETAS)
    return make_engine(module, accumulation, max_grad_norm, bf16, optimizer)


def matrix_by_hand(momentum: Tensor, gradient: Tensor) -> Tensor:
    """Move the momentum; the orthogonal matrix of Nesterov's look ahead."""
    momentum.copy_(0.95 * momentum + 0.05 * gradient)
    return by_hand(0.05 * gradient + 0.95 * momentum)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("accumulation", "max_grad_norm"), [(1, 0.0), (3, 0.1)])
def test_steps_of_one_process_are_those_written_out(
    accumulation: int, max_grad_norm: float, bf16: bool, held: bool
) -> None:
    engine = engine_of(Model(), accumulation, max_grad_norm, bf16)
    if held:
        engine.hold_gradients()
    run_steps(engine, accumulation)
    expected = run_by_hand(accumulation, max_grad_norm, bf16, matrix_by_hand)
    assert_weights(engine, expected, 2e-5)
    assert engine.global_steps == STEPS


def test_an_update_whose_gradient_is_not_finite_is_left_out() -> None:
    engine = engine_of(Model(), 1, 1.0, False)
    run_steps(engine, 1)
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    momentum = engine.optimizer.state[engine.module.matrix]["momentum"].clone()
    engine.backward(engine.module(torch.full((ROWS, 6), float("inf")), True))
    engine.step()
    assert not engine.get_global_grad_norm() < float("inf") and engine.skipped_steps == 1
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(engine.optimizer.state[engine.module.matrix]["momentum"], momentum)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("bert", {"query", "key", "value", "dense"}),
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_matrices_are_those_of_the_blocks(architecture: str, expected: set[str]) -> None:
    model = tiny_model(architecture)
    matrices = block_matrices(find_blocks(model))
    names = [name.split(".") for name, p in model.named_parameters() if p in matrices]
    assert len(names) == len(matrices)
    assert {name[-2] for name in names} == expected
    assert all(name[-1] == "weight" and {"layer", "layers", "h"} & set(name) for name in names)


def test_biases_of_stacked_experts_are_biases() -> None:
    """A row of one is no direction in the space of states: neither orthogonal nor pulled to 0."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    student = AutoModel.from_config(config)
    names = {p: name.split(".")[-1] for name, p in student.named_parameters()}
    assert {names[p] for p in block_matrices(find_blocks(student))} == {"weight"}
    groups = parameter_groups(student, Train(weight_decay=0.1))
    decayed, free = ({names[p] for p in group["params"]} for group in groups)
    assert decayed == {"weight", "gate_up_proj", "down_proj"}
    assert free == {"weight", "bias", "sinks", "gate_up_proj_bias", "down_proj_bias"}


def test_groups_keep_their_decay() -> None:
    student = tiny_model("bert")
    module: Any = torch.nn.ModuleDict({"student": student, "projection": torch.nn.Linear(3, 4)})
    module.student = student
    optimizer = make_optimizer(module, Train(optimizer="muon", weight_decay=0.1, betas=(0.8, 0.9)))
    groups = {(group["muon"], group["weight_decay"]): group for group in optimizer.param_groups}
    assert groups.keys() == {(True, 0.1), (False, 0.1), (False, 0.0)}
    assert set(groups[True, 0.1]["params"]) == block_matrices(find_blocks(student))
    others = set(groups[False, 0.1]["params"])
    assert module.projection.weight in others
    assert student.embeddings.word_embeddings.weight in others
    assert all(p.ndim <= 1 for p in groups[False, 0.0]["params"])
    assert all(group["betas"] == (0.8, 0.9) for group in groups.values())


def test_adamw_is_left_as_it_was() -> None:
    module: Any = SimpleNamespace(
        named_modules=lambda: [], named_parameters=torch.nn.Linear(2, 3).named_parameters
    )
    optimizer = make_optimizer(module, Train(betas=(0.8, 0.9)))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    assert all("muon" not in group for group in optimizer.param_groups)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes of which two ranks cut a matrix."""
    student = {"layers": 3, "hidden_size": 20, "heads": 4, "intermediate_size": 37}
    train = {
        "batch_size": 12,
        "optimizer": "muon",
        "schedule": "constant",
        "warmup_steps": 1,
        "checkpoint_every": 3,
    }
    return make_recipe(tmp_path_factory.mktemp("muon"), student=student, train=train)


def variant(recipe: Path, name: str, **given: Any) -> list[str]:
    named = {key.replace("__", "."): value for key, value in given.items()}
    return keys({"run.output": str(recipe.parent / name), **named})


def parameters(run: Path, step: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for path in (run / "checkpoints" / f"step-{step:08}").glob("parameters_rank_*.safetensors"):
        found |= read_state(path)
    return found


def away(run: Path, other: Path) -> float:
    """How far the matrices of two runs are apart, in steps 4 to 6 of the other; the largest."""
    before, there, here = parameters(other, 3), parameters(other, 6), parameters(run, 6)
    return max(
        float(
            (here[name]["weight"] - there[name]["weight"]).norm()
            / (there[name]["weight"] - before[name]["weight"]).norm()
        )
        for name, state in there.items()
        if "momentum" in state
    )


def test_ranks_and_stages_change_nothing(recipe: Path) -> None:
    """Also in the middle of a run, and in bf16."""
    bf16 = {"train__precision": "bf16"}
    run_variants(
        recipe,
        [
            variant(recipe, "alone"),
            variant(recipe, "moved", train__steps=3),
            variant(recipe, "alone-bf16", **bf16),
        ],
    )
    stages = {f"stage-{stage}": {"train__zero_stage": stage} for stage in (0, 1, 2)}
    lower = {f"bf16-{stage}": {"train__zero_stage": stage, **bf16} for stage in (1, 2)}
    run_variants(
        recipe,
        [
            *[variant(recipe, name, **given) for name, given in {**stages, **lower}.items()],
            variant(recipe, "moved", train__zero_stage=2),
        ],
        ranks=2,
    )
    folder = recipe.parent
    for name in (*stages, "moved"):
        assert_same_run(folder / name, folder / "alone", losses=1e-5, weights=1e-5)
        assert away(folder / name, folder / "alone") < 1e-3
    for name in lower:
        # a gradient's rounding is larger where directions of it are small
        assert away(folder / name, folder / "alone-bf16") < 0.4
    saved = parameters(folder / "moved", 6)
    query = "student.encoder.layer.0.attention.self.query"
    assert saved[f"{query}.weight"].keys() == {"weight", "momentum"}
    assert saved[f"{query}.bias"].keys() == {"weight", "exp_avg", "exp_avg_sq", "step"}


def test_what_muon_cannot_do_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"train.optimizer is muon and train.zero_stage 3, .*"):
        load_recipe(str(recipe), ["train.zero_stage=3"])
    zero = '{"offload_optimizer": {"device": "cpu"}}'
    offloaded = load_recipe(str(recipe), [f"deepspeed.zero_optimization={zero}"])
    plan: Any = SimpleNamespace(micro_batch_size=1, accumulation=1)
    with pytest.raises(UserError, match=r"offload_optimizer is given, and train.optimizer is muon"):
        deepspeed_of_student(offloaded, plan)
    with pytest.raises(UserError, match=r"train.optimizer"):
        load_recipe(str(recipe), ["train.optimizer=adam"])
