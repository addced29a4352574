"""A number of the student's section reaches every block with all that follows it, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from benchmarks.family_checks import inputs_of, outputs_of
from benchmarks.family_models import family_model
from fastkd.capture import find_blocks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import Initialisation, build_student, load_student
from fastkd.models.attention_heads import head_size
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


@pytest.mark.parametrize(
    ("name", "attention", "kept"),
    [
        ("bert", "attention.", "attention.output.LayerNorm."),
        ("distilbert", "attention.", "none"),
        ("gpt2", "attn.", "none"),
        ("llama", "self_attn.", "none"),
        ("modernbert", "attn.", "none"),
        ("qwen3", "self_attn.", "none"),
    ],
)
def test_attention_whose_heads_have_another_width_is_drawn(
    name: str, attention: str, kept: str
) -> None:
    teacher = tiny_model(name)
    with torch.no_grad():
        for parameter in teacher.parameters():
            # norms and biases that are not what they are drawn as
            parameter.add_(0.1 * torch.randn_like(parameter))
    student, started = student_of(teacher, heads=2)
    same = 0
    for own, whole in zip(find_blocks(student), find_blocks(teacher), strict=True):
        given = dict(whole.named_parameters())
        for path, parameter in own.named_parameters():
            drawn = path.startswith(attention) and not path.startswith(kept)
            assert torch.equal(parameter, given[path]) is not drawn, path
            same += parameter.numel() * drawn
    pooler = sum(p.numel() for n, p in student.named_parameters() if n.startswith("pooler."))
    assert started.copied == started.total - same and pooler < started.copied
    said = "its heads are 16 wide and the teacher's 8, so its attention is drawn"
    assert started.drawn == (said,)


def test_heads_of_the_teachers_width_are_copied_where_they_fit() -> None:
    teacher = tiny_model("llama")
    _, started = student_of(teacher)
    assert started.copied == started.total and started.drawn == ()
    # wider than their share of the hidden state, which no number asks to change
    assert student_of(tiny_model("qwen3", head_dim=16))[0].config.head_dim == 16
    # nothing fits, so nothing has to be said
    assert student_of(teacher, hidden_size=16)[1].drawn == ()
    fewer, started = student_of(teacher, kv_heads=4)
    own, given = fewer.layers[0].self_attn, teacher.layers[0].self_attn
    assert torch.equal(own.q_proj.weight, given.q_proj.weight) and started.drawn == ()
    assert own.k_proj.weight.shape != given.k_proj.weight.shape


@pytest.mark.parametrize(
    ("family", "setting", "given", "expected"),
    [
        ("gemma3_text", "query_pre_attn_scalar", 8, 16),
        ("gemma3_text", "query_pre_attn_scalar", 12, 12),
        ("granite", "attention_multiplier", 1 / 8, 1 / 16),
        ("granite", "attention_multiplier", 8**-0.5, 0.25),
        ("granite", "attention_multiplier", 0.3, 0.3),
    ],
)
def test_a_scale_that_is_the_width_of_heads_follows_it(
    family: str, setting: str, given: float, expected: float
) -> None:
    teacher = family_model(family, **{setting: given})
    assert head_size(teacher.config) == 8
    student, _ = student_of(teacher, heads=2)
    assert head_size(student.config) == 16
    assert getattr(student.config, setting) == expected
    assert getattr(student_of(teacher)[0].config, setting) == given


def test_a_start_whose_heads_were_kept_whole_keeps_their_scale(tmp_path: Path) -> None:
    teacher = family_model("gemma3_text")
    narrow = {"hidden_size": 16, "init": "importance"}
    start, _ = student_of(teacher, **narrow)
    assert (start.config.head_dim, start.config.query_pre_attn_scalar) == (8, 8)
    start.save_pretrained(tmp_path)
    student, _ = student_of(teacher, **{**narrow, "init": str(tmp_path)})
    assert (student.config.head_dim, student.config.query_pre_attn_scalar) == (8, 8)
    inputs = inputs_of(teacher, 12)
    assert torch.equal(outputs_of(student, inputs)[0], outputs_of(start, inputs)[0])


@pytest.mark.parametrize("numbers", [{"hidden_size": 16}, {"heads": 2}])
@pytest.mark.parametrize("family", ["xlnet", "falcon", "deepseek_v3", "gemma3n_text"])
def test_heads_of_another_width_run_and_are_read_again(
    family: str, numbers: dict[str, int], tmp_path: Path
) -> None:
    student, _ = student_of(family_model(family), **numbers)
    student.save_pretrained(tmp_path)
    inputs = inputs_of(student, 12)
    found = outputs_of(load_student(tmp_path), inputs)[0]
    assert torch.equal(found, outputs_of(student, inputs)[0])


@pytest.mark.parametrize("family", ["bamba", "squeezebert"])
def test_numbers_that_an_architecture_can_not_have_are_refused(family: str) -> None:
    teacher = family_model(family)
    with pytest.raises(UserError) as refused:
        student_of(teacher, hidden_size=16)
    message = str(refused.value)
    kind = type(teacher.config).__name__
    assert message.startswith(f"no {kind} can have the student's numbers and layers (")
    assert message.endswith("; give the student section others, or another layer_map")
    assert "\n" not in message
