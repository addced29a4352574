"""A student's blocks have what their teacher layers have, also where settings count layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, tiny_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from benchmarks.family_checks import blocks_in_a_row, inputs_of
from benchmarks.family_models import family_config, family_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import Initialisation, build_student, load_student, student_config
from fastkd.models.per_layer import cut_layers
from fastkd.recipe import Student


def student_of(
    teacher: PreTrainedModel, sources: tuple[int, ...], **numbers: Any
) -> tuple[PreTrainedModel, Initialisation]:
    layers = make_layer_map(sources, len(sources), teacher.config.num_hidden_layers)
    student, started = build_student(teacher, Student(layers=len(sources), **numbers), layers)
    return student.eval(), started


def test_smollm3_keeps_the_layers_without_rotary_embeddings() -> None:
    """Every fourth of its layers has none: cut to 4 and 8, the student has none at all."""
    teacher = family_model("smollm3", num_hidden_layers=8)
    assert teacher.config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    for sources, expected in (((4, 8), [0, 0]), ((2, 4), [1, 0]), ((1, 2), [1, 1])):
        student, started = student_of(teacher, sources)
        assert student.config.no_rope_layers == expected
        assert started.copied == started.total
        blocks_in_a_row(student, teacher, sources, inputs_of(teacher, 20))


@pytest.mark.parametrize(
    ("family", "changes", "sources", "expected"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, (2, 3), {"mlp_only_layers": [0]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}, (2, 3, 4), {"first_k_dense_replace": 1}),
        ("llama4_text", {"moe_layers": [1, 3]}, (2, 3, 4), {"moe_layers": [0, 2]}),
        (
            "ernie4_5_moe",
            {"moe_layer_start_index": 2, "moe_layer_end_index": 3, "moe_layer_interval": 1},
            (2, 3),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        ("lfm2", {}, (2, 3), {"layer_types": ["full_attention", "full_attention"]}),
        ("dinov2", {}, (2, 4), {"stage_names": ["stem", "stage1", "stage2"]}),
    ],
)
def test_settings_of_layers_are_cut_and_read_again(
    family: str,
    changes: dict[str, Any],
    sources: tuple[int, ...],
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    teacher = family_model(family, **changes)
    student, started = student_of(teacher, sources)
    student.save_pretrained(tmp_path)
    again = load_student(tmp_path)
    for model in (student, again):
        assert {name: getattr(model.config, name) for name in expected} == expected
        blocks_in_a_row(model, teacher, sources, inputs_of(teacher, 20))
    assert started.copied == started.total


def test_only_what_counts_layers_is_cut() -> None:
    config = family_config("smollm3")
    config.something = [1, 2, 3]
    assert set(cut_layers(config, (2, 4))) == {"no_rope_layers", "layer_types"}
    # of the last two layers, numbers 3 and 4
    shared = family_config("gemma3n_text", num_kv_shared_layers=2)
    for sources, expected in (((1, 3), 1), ((1, 2), 0), ((3, 4), 2)):
        assert cut_layers(shared, sources)["num_kv_shared_layers"] == expected


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "eos_token_id", [5, 6, 7, 8]),
        ("llama", "architectures", ["A", "B", "C", "D"]),
        ("whisper", "begin_suppress_tokens", [1, 2, 3, 4]),
        ("falcon_h1", "ssm_multipliers", [1.0, 2.0, 3.0, 4.0]),
        ("vit", "image_size", [1, 2, 3, 4]),
    ],
)
def test_a_list_that_is_as_long_by_chance_is_left_whole(
    family: str, name: str, value: list[Any]
) -> None:
    config = CONFIG_MAPPING[family](num_hidden_layers=LAYERS)
    setattr(config, name, value)
    assert name not in cut_layers(config, (2, 4))
    layers = make_layer_map((2, 4), 2, config.num_hidden_layers)
    if family == "llama":
        assert getattr(student_config(config, Student(layers=2), layers), name) == value


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("diffllama", {}, "self_attn.lambda_init is"),
        # residuals scaled by the number of layers
        ("minicpm3", {}, "residual_scale is"),
        ("esmc", {}, "scaling_factor is"),
        ("jamba", {}, "feed_forward.class is JambaSparseMoeBlock, with JambaMLP"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attn.scaling is"),
        # a row of a table for each layer
        ("gemma3n_text", {}, "embed_tokens_per_layer.weight.shape is"),
    ],
)
def test_what_position_alone_decides_is_refused(
    family: str, changes: dict[str, Any], what: str
) -> None:
    teacher = family_model(family, **changes)
    with pytest.raises(UserError, match=what) as refused:
        student_of(teacher, (2, 4))
    assert "layer_map" in str(refused.value) and "student.init=random" in str(refused.value)
    # nothing is copied, so nothing has to agree
    student_of(teacher, (2, 4), init="random")


def test_layers_that_keep_their_places_are_not_refused() -> None:
    teacher = family_model("diffllama")
    student, _ = student_of(teacher, (1, 2))
    blocks_in_a_row(student, teacher, (1, 2), inputs_of(teacher, 20))


def test_what_a_place_has_not_is_said() -> None:
    """ModernBERT's first block has no first normalisation, whatever layer it starts from."""
    assert student_of(tiny_model("modernbert"), (1, 4))[1].missing == ()
    started = student_of(tiny_model("modernbert"), (2, 4))[1]
    assert started.missing == ("layer 1 has no attn_norm, which teacher layer 2 has",)


def test_a_cut_setting_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM3 as it was cut before."""
    from fastkd.models import student as students

    def forgetful(*given: Any) -> dict[str, Any]:
        return {n: v for n, v in cut_layers(*given).items() if n != "no_rope_layers"}

    teacher = family_model("smollm3", num_hidden_layers=8)
    monkeypatch.setattr(students, "cut_layers", forgetful)
    with pytest.raises(UserError, match="student layer 1 would start from teacher layer 4, whose"):
        student_of(teacher, (4, 8))


def test_students_of_other_widths_keep_the_settings_of_their_layers() -> None:
    teacher = family_model("smollm3", num_hidden_layers=8)
    student, _ = student_of(teacher, (4, 8), hidden_size=16)
    assert student.config.no_rope_layers == [0, 0]
    with torch.no_grad():
        student(**inputs_of(teacher, 20), use_cache=False)
