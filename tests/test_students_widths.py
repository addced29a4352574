"""A number of the student's section reaches every block, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.family_checks import inputs_of
from benchmarks.family_models import family_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import Initialisation, build_student, load_student
from fastkd.recipe import Student


def student_of(teacher: PreTrainedModel, **numbers: Any) -> tuple[PreTrainedModel, Initialisation]:
    """A student of its teacher's depth."""
    depth = teacher.config.num_hidden_layers
    layers = make_layer_map("uniform", depth, depth)
    student, started = build_student(teacher, Student(layers=depth, **numbers), layers)
    return student.eval(), started


EXPERTS = "the width moe_intermediate_size"
SHARED = "the width shared_intermediate_size"


@pytest.mark.parametrize(
    ("family", "kept", "reason"),
    [
        ("qwen3_moe", "mlp.experts.gate_up_proj of block 1 stays [128, 48, 32]", EXPERTS),
        ("deepseek_v3", "mlp.experts.gate_up_proj of block 2 stays [4, 48, 32]", EXPERTS),
        ("granitemoehybrid", "shared_mlp.input_linear.weight of block 1 stays [2048, 32]", SHARED),
        ("glm4v_vision", "mlp.gate_proj.weight of block 1 stays [32, 32]", "a width of its own"),
    ],
)
def test_a_width_that_not_every_block_follows_is_refused(
    family: str, kept: str, reason: str
) -> None:
    teacher = family_model(family)
    for init in ("teacher", "random", "importance"):
        with pytest.raises(UserError) as refused:
            student_of(teacher, intermediate_size=24, init=init)
        assert str(refused.value) == (
            f"student.intermediate_size 24: {kept}, as {type(teacher.config).__name__} gives it "
            f"{reason}; leave student.intermediate_size out"
        )
    # the teacher's own number asks for nothing
    student_of(teacher, intermediate_size=teacher.config.intermediate_size)


def test_experts_that_have_the_usual_number_follow_it() -> None:
    student, _ = student_of(family_model("mixtral"), intermediate_size=24)
    assert {tuple(block.mlp.experts.down_proj.shape[1:]) for block in student.layers} == {(32, 24)}


def test_a_width_that_is_said_layer_by_layer_is_the_students(tmp_path: Path) -> None:
    teacher = family_model("gemma3n_text")
    layers = make_layer_map((2, 4), 2, teacher.config.num_hidden_layers)
    section = Student(layers=2, intermediate_size=24, init="random")
    student, _ = build_student(teacher, section, layers)
    assert student.config.intermediate_size == [24, 24]
    student.save_pretrained(tmp_path)
    for model in (student, load_student(tmp_path)):
        assert {block.mlp.down_proj.in_features for block in model.layers} == {24}
        with torch.no_grad():
            model(**inputs_of(teacher, 12), use_cache=False)
