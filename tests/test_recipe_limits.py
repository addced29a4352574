"""What no run could do is refused in one line, before data or models are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_recipes import LABELLED, TEXT, TUNED, Tree, replaced
from tiny_models import tiny_config
from tiny_training import fastkd, save_classifier, write_recipe, write_task

from fastkd.data.batching import plan_batches
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.limits import Memory
from fastkd.models import student_config
from fastkd.recipe import Student, Train, parse_any_recipe, resolve_steps, write_yaml
from fastkd.training.deepspeed_config import deepspeed_of_student
from fastkd.training.engine import check_config
from fastkd.training.memory import (
    check_micro_batch,
    memory_errors,
)

CPU = torch.device("cpu")
HUGE = 10**400
# a field, its value, what is said of it
WRONG: list[tuple[str, Any, str]] = [
    ("layer_map", {"kind": ["emd"]}, "layer_map: expected uniform"),
    ("layer_map", {"kind": {}}, "layer_map: expected uniform"),
    ("layer_map", [{}, []], "layer_map: expected uniform"),
    ("layer_map", [HUGE, 1], "layer_map: expected uniform"),
    ("layer_map", {"kind": "emd", "temperature": 1e-320}, "layer_map.temperature: input should be"),
    ("layer_map", {"kind": "attention", "temperature": 1e200}, "layer_map.temperature: input shou"),
    ("losses", 3, "losses: expected a section with keys attention, relations"),
    ("losses.relations.relations", ["kk", "kk"], "losses.relations: relations names one twice"),
    ("losses.relations.temperature", 1e200, "losses.relations.temperature: input should be less"),
    ("losses.hidden.layer_map", {"kind": []}, "losses.hidden.layer_map: expected uniform"),
    ("train.seed", 2**63, "train.seed: expected a number of 64 bits (given one of 64)"),
    ("train.seed", HUGE, "train.seed: expected a number of 64 bits"),
    ("train.steps", HUGE, "train.steps: expected a number of 64 bits"),
    ("train.steps", 10**9, "train.steps: input should be less than or equal to 10000000"),
    ("train.batch_size", 10**12, "train.batch_size: input should be less than or equal to"),
    ("train.learning_rate", HUGE, "train.learning_rate: expected a number of 64 bits"),
    ("run.output", "x" * 300, "run.output: expected a path of at most 3800 bytes, 255 a part"),
    ("run.output", "é" * 200, "run.output: expected a path of at most 3800 bytes, 255 a part"),
    ("run.output", "a/" * 2500, "run.output: expected a path of at most 3800 bytes"),
    ("run.output", "a\0b", "run.output: expected a path, which holds no NUL"),
    ("run.output", "~no-such-user/x", "run.output: no such home folder"),
    ("run.output", "\ud800", "run.output: input should be a valid string, unable to parse"),
    ("teacher.model", "a\0b", "teacher.model: expected a path, which holds no NUL"),
    ("student.init", "a\0b", "student.init: expected a path, which holds no NUL"),
    ("data.train", ["a", "b\0"], "data.train.1: expected a path, which holds no NUL"),
    ("data.cache", "~no-such-user", "data.cache: no such home folder"),
    ("data.workers", 10**9, "data.workers: input should be less than or equal to 1024"),
    ("student.layers", 10**9, "student.layers: input should be less than or equal to 10000"),
    ("stages", 3, "stages: input should be a list (given 3)"),
    ("stages", {"a": 1}, "stages: input should be a list"),
    ("preset", HUGE, "preset: expected one of tinybert"),
    ("deepspeed", {"a": float("nan")}, "deepspeed: expected a finite number (given nan)"),
    ("deepspeed", {"a": {"b": HUGE}}, "deepspeed: expected a number of 64 bits"),
    ("deepspeed", {1: 2}, "deepspeed: expected text for a key (given 1)"),
]


@pytest.mark.parametrize(("field", "value", "expected"), WRONG, ids=lambda value: repr(value)[:30])
def test_wrong_values_are_named_in_one_line(field: str, value: Any, expected: str) -> None:
    tree = replaced(TEXT, tuple(field.split(".")), value)
    with pytest.raises(UserError) as refused:
        parse_any_recipe(tree)
    assert f"recipe: {expected}" in str(refused.value) or str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("base", [LABELLED, TUNED], ids=["distill", "finetune"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dropout": 0.1}, "which has no dropout, but dropout is 0.1"),
        ({"gradient_checkpointing": True}, "which can't be recomputed"),
    ],
)
def test_flex_attention_is_refused_what_it_can_not_do(
    base: Tree, settings: dict[str, Any], expected: str
) -> None:
    section = "model" if base is TUNED else "student"
    flex = {**base[section], "attention": "flex_attention"}
    assert parse_any_recipe({**base, section: {**flex, "dropout": 0}})
    with pytest.raises(UserError, match=f"{section}: attention is flex_attention, {expected}"):
        parse_any_recipe({**base, section: {**flex, **settings}})


def test_flex_attention_is_refused_the_dropout_of_a_teacher() -> None:
    section = Student(layers=2, attention="flex_attention", dropout=None)
    layers = make_layer_map("uniform", 2, 4)
    expected = r"student\.attention is flex_attention, which has no dropout, but \w+ is 0\.1"
    with pytest.raises(UserError, match=expected):
        student_config(tiny_config("bert"), section, layers)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    assert student_config(tiny_config("bert", **rates), section, layers)


def test_more_steps_than_a_run_has_are_refused() -> None:
    with pytest.raises(ValueError, match="are 20,000,000 steps, expected at most 10,000,000"):
        resolve_steps(Train(epochs=20, batch_size=1), 1_000_000)
    assert resolve_steps(Train(epochs=1e6, batch_size=2**24), 1).steps == 1


REFUSED = [
    {"zero_optimization": {"reduce_bucket_size": "x"}},
    {"zero_optimization": {"nope": 1}},
    {"flops_profiler": 3},
    {"flops_profiler": {"enabled": "maybe"}},
    {"activation_checkpointing": [1]},
    {"pipeline": 3},
    {"data_efficiency": 4},
    {"communication_data_type": "x"},
    {"wall_clock_breakdown": "x"},
    {"csv_monitor": {"enabled": 3}},
    {"comms_logger": {"enabled": "x"}},
    {"timers": 3},
]


@pytest.mark.parametrize("section", REFUSED, ids=str)
def test_a_section_that_deepspeed_refuses_is_one_line(section: Tree) -> None:
    recipe = parse_any_recipe({**TEXT, "deepspeed": section})
    with pytest.raises(UserError, match=r"^deepspeed: DeepSpeed can't use the section") as refused:
        check_config(deepspeed_of_student(recipe, plan_batches(recipe, 1)))
    assert "\n" not in str(refused.value)


def test_a_section_that_deepspeed_takes_is_left_alone() -> None:
    recipe = parse_any_recipe({**TEXT, "deepspeed": {"wall_clock_breakdown": True}})
    config = deepspeed_of_student(recipe, plan_batches(recipe, 1))
    before = str(config)
    check_config(config)
    assert str(config) == before


def test_a_micro_batch_that_can_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = replaced(TEXT, ("train",), {"batch_size": 2**24})
    recipe = parse_any_recipe(replaced(tree, ("data", "block_size"), 2**20))
    monkeypatch.setattr("fastkd.training.memory.memory", lambda: Memory(2**34, 2**30))
    expected = (
        "train.micro_batch_size: 16,777,216 rows of 1048576 tokens need 196,608.0 GiB for ids and "
        "hidden states alone, but this machine has 16.0 GiB; give a smaller train.micro_batch_size"
    )
    with pytest.raises(UserError) as refused:
        check_micro_batch(recipe, 2**24, CPU)
    assert str(refused.value) == expected
    check_micro_batch(recipe, 1, CPU)
    # ids, and 24 layers of 1024 numbers in fp32
    with pytest.raises(UserError, match=r"64 rows of 1048576 tokens need 6,144\.5 GiB"):
        check_micro_batch(recipe, 64, CPU, 1024, 24)
    monkeypatch.setattr("fastkd.training.memory.memory", lambda: Memory(2**31, 2**30, "ulimit -v"))
    with pytest.raises(UserError, match=r"alone, but ulimit -v allows 2\.0 GiB; give a smaller"):
        check_micro_batch(recipe, 64, CPU, 1024, 24)


def test_a_failed_allocation_says_what_was_asked_and_what_there_is() -> None:
    recipe = parse_any_recipe(TEXT)
    expected = r"^out of memory \(\S+ GiB asked at once\): this machine has .* GiB, and micro-bat"
    with pytest.raises(UserError, match=expected), memory_errors(recipe, CPU):
        torch.empty(2**60)
    with (
        pytest.raises(UserError, match=r"^out of memory: this machine"),
        memory_errors(recipe, CPU),
    ):
        raise MemoryError
    gpu = "CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 79 GiB"
    with pytest.raises(UserError, match=r"3\.91 GiB asked"), memory_errors(recipe, CPU):
        raise torch.OutOfMemoryError(gpu)
    with pytest.raises(RuntimeError, match=r"^other$"), memory_errors(recipe, CPU):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"batch_size": 2**24}, "task": {"max_length": 64}}, "hidden states alone"),
        ({"deepspeed": {"flops_profiler": 3}}, "DeepSpeed can't use the section"),
        ({"losses": 3}, "losses: expected a section"),
    ],
)
def test_the_command_reads_no_data_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: Tree,
    expected: str,
) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier", num_labels=2)
    # a machine of 1 GiB
    monkeypatch.setattr("fastkd.training.memory.memory", lambda: Memory(2**30, 2**29))
    path = write_recipe(tmp_path, "run", **changes)
    if "losses" in changes:
        path.write_text(write_yaml({**LABELLED, **changes}))
    assert fastkd("distill", str(path), monkeypatch=monkeypatch) == 2
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("fastkd:")]
    assert len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_recipe_that_its_folder_could_not_give_back_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, "run")
    # written as six characters each
    labels = f"task.labels=[no, yes, {chr(0x200B) * 200_000}]"
    for command in ("distill", "doctor"):
        assert fastkd(command, str(path), labels, monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert re.search(r"the recipe has, with every default written out, 1,2\d\d,\d+ char", said)
    assert not (tmp_path / "run").exists()
