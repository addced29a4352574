"""`auto` becomes the precision of the machine, once; TF32 is for models, and for a run's time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastkd_kernels.common import autograd
from fastkd_kernels.common.fp32_products import fp32_products
from fastkd_kernels.hidden.op import _rows
from tiny_models import tiny_model
from tiny_runs import make_recipe
from transformers import LlamaPreTrainedModel

import fastkd
from fastkd.distributed import joined_ranks
from fastkd.recipe import FinetuneRecipe, Recipe, load_recipe, parse_finetune_recipe
from fastkd.reporting.console import Reporter
from fastkd.training import doctor, loop, precision
from fastkd.training.precision import (
    PLAIN_ATTENTION_TOKENS,
    attention_on_cpus,
    describe_precision,
    settle_precision,
    tf32_products,
)

MATMUL: Any = torch.backends.cuda.matmul
GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "takes_bf16", lambda _device: True)


@pytest.fixture
def untouched() -> Iterator[None]:
    """The process's own choice of products, as it was."""
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "none"


def chosen(recipe: Recipe | FinetuneRecipe) -> tuple[str, ...]:
    with joined_ranks() as ranks:
        found = settle_precision(recipe, ranks)
    teacher = (found.teacher.dtype,) if isinstance(found, Recipe) else ()
    return found.train.precision, *teacher


def tuned() -> FinetuneRecipe:
    task = {"source": "some/folder", "name": "mrpc"}
    return parse_finetune_recipe({"model": "some/model", "task": task, "run": {"output": "x"}}, "")


def test_a_cpu_computes_in_fp32(tmp_path: Path) -> None:
    assert chosen(load_recipe(make_recipe(tmp_path))) == ("fp32", "float32")
    assert chosen(tuned()) == ("fp32",)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("bf16", "bfloat16")),
        (["train.zero_stage=0"], ("fp32", "bfloat16")),
        (["train.precision=fp32"], ("fp32", "bfloat16")),
        (["teacher.dtype=float16"], ("bf16", "float16")),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_computes_in_bf16(
    tmp_path: Path, overrides: list[str], expected: tuple[str, ...]
) -> None:
    assert chosen(load_recipe(make_recipe(tmp_path), overrides)) == expected
    assert chosen(tuned()) == ("bf16",)


@pytest.mark.usefixtures("gpu")
def test_a_student_that_keeps_parameters_in_fp32_trains_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["o_proj"])
    path = make_recipe(tmp_path, "llama", train={"steps": 1, "warmup_steps": 0})
    # whose products a teacher in bf16 couldn't make
    whole = {"teacher.dtype": "float32"}
    kept = "LlamaModel keeps layers.0.self_attn.o_proj.weight in fp32, of 2 parameters"
    with pytest.raises(fastkd.UserError, match=f"^train.precision is bf16, but {kept}; set train"):
        fastkd.distill(path, {"train.precision": "bf16", **whole}, quiet=True)
    fastkd.distill(path, whole)
    said = f"precision: student fp32 ({kept}, which bf16 would round), teacher float32\n"
    assert said in capsys.readouterr().out
    task = {"source": "some/folder", "name": "mrpc"}
    tuned = {"model": str(tmp_path / "teacher"), "task": task, "run": {"output": "x"}}
    assert chosen(parse_finetune_recipe(tuned, "")) == ("fp32",)


def test_a_run_keeps_what_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path, train={"steps": 2, "schedule": "constant", "warmup_steps": 0})
    fastkd.distill(path)
    assert "precision: student fp32, teacher float32\n" in capsys.readouterr().out
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (written.train.precision, written.teacher.dtype) == ("fp32", "float32")
    # another machine
    monkeypatch.setattr(precision, "takes_bf16", lambda _device: True)
    fastkd.distill(path, {"train.steps": 3}, resume=True, quiet=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.precision == "fp32"
    with pytest.raises(fastkd.UserError, match=r"with train.precision='fp32', now 'bf16' is given"):
        fastkd.distill(path, {"train.precision": "bf16"}, resume=True, quiet=True)


@pytest.mark.usefixtures("untouched")
def test_models_read_tf32_for_a_while(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path))
    before = MATMUL.fp32_precision, torch.get_float32_matmul_precision()
    with tf32_products(GPU, True):
        assert MATMUL.fp32_precision == "tf32"
        assert describe_precision(recipe, tiny_model("bert"), GPU).endswith(
            "; products of fp32 read TF32, those of the losses' kernels fp32"
        )
        with fp32_products():
            assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.fp32_precision == "tf32"
    assert (MATMUL.fp32_precision, torch.get_float32_matmul_precision()) == before
    for device, wanted in ((GPU, False), (torch.device("cpu"), True)):
        with tf32_products(device, wanted):
            assert MATMUL.fp32_precision == before[0]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("choice", ["ieee", "tf32"])
def test_a_process_keeps_its_own_choice(choice: str) -> None:
    MATMUL.fp32_precision = choice
    with tf32_products(GPU, True):
        assert MATMUL.fp32_precision == choice
        with fp32_products():
            assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == choice


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("backend", "expected"), [("torch", "ieee"), ("triton", "tf32")])
def test_kernels_products_in_torch_are_fp32(
    backend: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the program says; Triton's say it themselves, and nothing is switched for them."""

    class OnGpu:
        is_cuda = True
        device = GPU

    def seen(*_call: object) -> str:
        return str(MATMUL.fp32_precision)

    monkeypatch.setattr(autograd, "on_its_device", seen)
    torch.set_float32_matmul_precision("high")
    arguments: list[Any] = [[OnGpu()] for _ in _rows.names]
    arguments[_rows.names.index("backend")] = backend
    assert _rows.run(lambda: None, arguments) == expected
    assert MATMUL.fp32_precision == "tf32"


@pytest.mark.parametrize(
    ("device", "dtype", "length", "fused"),
    [
        ("cpu", "bf16", PLAIN_ATTENTION_TOKENS, False),
        ("cpu", "bf16", PLAIN_ATTENTION_TOKENS + 1, True),
        ("cpu", "fp32", PLAIN_ATTENTION_TOKENS, True),
        ("cuda", "bf16", PLAIN_ATTENTION_TOKENS, True),
    ],
)
def test_short_rows_in_bf16_are_attended_to_plainly_on_a_cpu(
    tmp_path: Path, device: str, dtype: str, length: int, fused: bool
) -> None:
    given = [f"train.precision={dtype}", f"data.block_size={length}"]
    recipe = load_recipe(make_recipe(tmp_path), given)
    assert torch.backends.cuda.flash_sdp_enabled()
    with attention_on_cpus(torch.device(device), recipe):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether attention was made by plain products, wherever a run or doctor set one up."""
    seen: list[bool] = []

    def set_up(*_given: Any, **_options: Any) -> None:
        seen.append(not torch.backends.cuda.flash_sdp_enabled())
        raise fastkd.UserError("seen")

    monkeypatch.setattr(doctor, "set_up", set_up)
    monkeypatch.setattr(loop, "set_up", set_up)
    return seen


@pytest.mark.parametrize(("dtype", "plain"), [("bf16", True), ("fp32", False)])
@pytest.mark.parametrize("staged", [False, True])
def test_doctor_and_each_stage_multiply_as_their_run_does(
    tmp_path: Path, plain_attention: list[bool], dtype: str, plain: bool, staged: bool
) -> None:
    other = "fp32" if plain else "bf16"
    stages = [f"stages=[{{train: {{precision: {dtype}}}}}]", f"train.precision={other}"]
    given = stages if staged else [f"train.precision={dtype}"]
    recipe = load_recipe(make_recipe(tmp_path), given)
    reporter = Reporter(silent=True)
    with joined_ranks() as ranks:
        with pytest.raises(fastkd.UserError, match="seen"):
            doctor.estimate_run(recipe, ranks, reporter)
        with pytest.raises(fastkd.UserError, match="seen"):
            loop.run_recipe(recipe, ranks, resume=False, reporter=reporter)
    assert plain_attention == [plain, plain]
