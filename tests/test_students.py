"""A student has exactly the recipe's numbers and starts from exactly the mapped weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    NAMES,
    WIDTH,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from benchmarks.family_models import family_model
from fastkd.capture import capture, capture_keywords, find_blocks, route_attention
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import (
    Initialisation,
    build_student,
    dropout_rates,
    load_student,
    student_config,
)
from fastkd.models.importance import start_by_importance
from fastkd.models.student import recompute_blocks
from fastkd.recipe import Student

BATCH = tiny_batch()
ROTARY = ("llama", "qwen2", "qwen3", "modernbert")
GROUPED = ("llama", "qwen2", "qwen3")


def shrink(config: PreTrainedConfig, layers: int = 2, **numbers: Any) -> PreTrainedConfig:
    """The configuration of a student of so many layers."""
    mapped = make_layer_map("uniform", layers, config.num_hidden_layers)
    return student_config(config, Student(layers=layers, **numbers), mapped)


def student_of(
    teacher: PreTrainedModel, layer_map: Any = "uniform", layers: int = 2, **numbers: Any
) -> tuple[PreTrainedModel, Initialisation]:
    mapped = make_layer_map(layer_map, layers, teacher.config.num_hidden_layers)
    return build_student(teacher, Student(layers=layers, **numbers), mapped)


def pooled_out(name: str) -> PreTrainedModel:
    """A tiny teacher as `load_teacher` leaves it."""
    model = tiny_model(name)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_students_numbers_reach_its_modules(name: str) -> None:
    numbers = {"hidden_size": 24, "heads": 2, "intermediate_size": 20}
    student, _ = student_of(pooled_out(name), layers=3, **numbers)
    assert len(find_blocks(student)) == 3
    assert student.get_input_embeddings().embedding_dim == 24
    assert getattr(student.config, ARCHITECTURES[name].feed_forward) == 20
    route_attention(student)
    with torch.no_grad(), capture(student, attention=[1, 3]) as states:
        assert student(**BATCH, **capture_keywords(student)).last_hidden_state.shape[-1] == 24
    assert {state.query.shape[1::2] for state in states.attention.values()} == {(2, 12)}
    if name in GROUPED:
        assert states.attention[1].key.shape[1] == 1


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_given_are_the_teachers(name: str) -> None:
    config = shrink(tiny_config(name))
    assert (config.hidden_size, config.num_attention_heads) == (WIDTH, HEADS)
    assert getattr(config, ARCHITECTURES[name].feed_forward) == INTERMEDIATE
    assert getattr(config, "num_key_value_heads", KV_HEADS) == KV_HEADS


def test_the_teachers_configuration_is_not_changed() -> None:
    config = tiny_config("modernbert")
    before = config.to_dict()
    shrink(config, hidden_size=16, heads=2, intermediate_size=20)
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_heads_that_do_not_divide_the_width_are_refused(name: str) -> None:
    expected = "student.hidden_size 32 is not a multiple of its 5 heads; change student.hidden_size"
    with pytest.raises(UserError, match=expected):
        shrink(tiny_config(name), heads=5)


@pytest.mark.parametrize("name", NAMES)
def test_odd_heads_are_refused_with_rotary_embeddings_only(name: str) -> None:
    if name not in ROTARY:
        assert shrink(tiny_config(name), hidden_size=20).hidden_size == 20
        return
    with pytest.raises(UserError, match=r"student heads are 5 wide, .* need an even width"):
        shrink(tiny_config(name), hidden_size=20)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, 2),
        ({"heads": 2}, 1),
        ({"heads": 1}, 1),
        ({"heads": 8}, 4),
        ({"kv_heads": 4}, 4),
        ({"kv_heads": 1}, 1),
        ({"heads": 8, "kv_heads": 2}, 2),
    ],
)
@pytest.mark.parametrize("name", GROUPED)
def test_key_value_heads_are_scaled_with_the_heads(
    name: str, numbers: dict[str, int], expected: int
) -> None:
    assert shrink(tiny_config(name), **numbers).num_key_value_heads == expected


def test_key_value_heads_divide_the_heads() -> None:
    expected = "student has 4 heads and 3 key-value heads, expected a multiple; set student.kv_he"
    with pytest.raises(UserError, match=expected):
        shrink(tiny_config("llama"), kv_heads=3)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GROUPED])
def test_key_value_heads_are_refused_without_grouped_attention(name: str) -> None:
    with pytest.raises(UserError, match=r"student.kv_heads: \w+Config has no grouped-query"):
        shrink(tiny_config(name), kv_heads=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uniform", ["sliding_attention", "full_attention"]),
        ("last", ["sliding_attention", "full_attention"]),
        ("first", ["full_attention", "sliding_attention"]),
        ([4, 0], ["full_attention", "full_attention"]),
    ],
)
def test_layer_types_follow_the_mapped_layers(given: Any, expected: list[str]) -> None:
    teacher = tiny_model("modernbert")
    full, sliding = "full_attention", "sliding_attention"
    assert teacher.config.layer_types == [full, sliding, sliding, full]
    student, _ = student_of(teacher, given)
    assert student.config.layer_types == expected
    with torch.no_grad():
        student(**BATCH)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_off_unless_the_teachers_rates_are_asked_for(name: str) -> None:
    rates = dropout_rates(tiny_config(name))
    assert rates
    assert set(dropout_rates(shrink(tiny_config(name))).values()) == {0.0}
    assert dropout_rates(shrink(tiny_config(name), dropout=None)) == rates
    assert set(dropout_rates(shrink(tiny_config(name), dropout=0.3)).values()) == {0.3}


@pytest.mark.parametrize("name", NAMES)
def test_a_student_without_dropout_is_deterministic_in_training(name: str) -> None:
    student, _ = student_of(pooled_out(name))
    assert student.training
    with torch.no_grad():
        first, second = (
            student(**BATCH, **capture_keywords(student)).last_hidden_state for _ in range(2)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("layer_map", ["uniform", "last", "first", "skip", [3, 0]])
@pytest.mark.parametrize("name", NAMES)
def test_mapped_blocks_are_copied_exactly(name: str, layer_map: Any) -> None:
    teacher = pooled_out(name)
    student, start = student_of(teacher, layer_map)
    sources = make_layer_map(layer_map, 2, LAYERS).sources()
    blocks = find_blocks(teacher)
    for block, source in zip(find_blocks(student), sources, strict=True):
        # the first block of ModernBERT alone has no norm before its attention
        given = dict(blocks[source - 1].named_parameters())
        for parameter, value in block.named_parameters():
            assert parameter in given or (name == "modernbert" and parameter == "attn_norm.weight")
            if parameter in given:
                assert torch.equal(value, given[parameter])
    missing = sum(
        parameter.numel()
        for block, source in zip(find_blocks(student), sources, strict=True)
        for key, parameter in block.named_parameters()
        if key not in dict(blocks[source - 1].named_parameters())
    )
    assert start.total == sum(parameter.numel() for parameter in student.parameters())
    assert start.copied == start.total - missing
    assert name == "modernbert" or start.copied == start.total


@pytest.mark.parametrize("name", NAMES)
def test_a_student_of_full_depth_is_its_teacher(name: str) -> None:
    teacher = pooled_out(name)
    student, start = student_of(teacher, layers=LAYERS)
    assert start.copied == start.total
    with torch.no_grad():
        expected = teacher(**BATCH, **capture_keywords(teacher)).last_hidden_state
        assert torch.equal(
            student.eval()(**BATCH, **capture_keywords(student)).last_hidden_state, expected
        )


@pytest.mark.parametrize("name", NAMES)
def test_only_what_agrees_in_shape_is_copied(name: str) -> None:
    teacher = pooled_out(name)
    student, start = student_of(teacher, intermediate_size=20)
    expected = 0
    given = dict(teacher.named_parameters())
    sources = make_layer_map("uniform", 2, LAYERS).sources()
    blocks = find_blocks(student)
    prefix = next(path for path, module in student.named_modules() if module is blocks)
    for key, parameter in student.named_parameters():
        if key.startswith(prefix + "."):
            number, rest = key.removeprefix(prefix + ".").split(".", 1)
            key = f"{prefix}.{sources[int(number)] - 1}.{rest}"
        if key in given and given[key].shape == parameter.shape:
            assert torch.equal(parameter, given[key])
            expected += parameter.numel()
    assert start.copied == expected
    assert 0 < start.copied < start.total


def test_nothing_is_copied_where_no_shape_agrees() -> None:
    _, start = student_of(pooled_out("bert"), hidden_size=16, intermediate_size=20)
    assert start.copied == 0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_random_start_copies_nothing(name: str) -> None:
    teacher = pooled_out(name)
    student, start = student_of(teacher, init="random")
    assert start.copied == 0
    own, theirs = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert not torch.equal(own, theirs)


def test_a_random_start_is_drawn_from_the_seed() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(student_of(tiny_model("bert"), init="random")[0])
    torch.manual_seed(4)
    other = student_of(tiny_model("bert", seed=4), init="random")[0]
    first, second, third = (model.get_input_embeddings().weight for model in (*drawn, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("start", ["teacher", "importance"])
def test_trained_buffers_are_taken_over(start: str) -> None:
    """A router's bias is no parameter, and 0 in every model that is drawn."""
    teacher = family_model("deepseek_v3")
    for name, buffer in teacher.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer))
    depth = teacher.config.num_hidden_layers

    def started(sources: tuple[int, ...]) -> PreTrainedModel:
        layers = make_layer_map(sources, len(sources), depth)
        section = Student(layers=len(sources), init=start)
        student, _ = build_student(teacher, section, layers)
        if start == "importance":
            with joined_ranks() as ranks:
                start_by_importance(student, teacher, layers, [], ranks)
        return student

    # of the teacher's block that is mapped, not of the one in its place
    for own, source in zip(
        find_blocks(started((depth - 1, depth))), (depth - 1, depth), strict=True
    ):
        given = dict(find_blocks(teacher)[source - 1].named_buffers())
        biases = {name: bias for name, bias in own.named_buffers() if name.endswith("_bias")}
        assert biases and all(torch.equal(bias, given[name]) for name, bias in biases.items())
    student = started(tuple(range(1, depth + 1)))
    ids = torch.arange(20).view(1, 20) + 3
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=ids, use_cache=False)[0] for m in (student, teacher))
    assert torch.equal(ours, theirs)


def test_how_a_decoder_ends_is_taken_over(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    teacher.generation_config.update(eos_token_id=[7, 9, 11], pad_token_id=5, temperature=0.6)
    teacher.generation_config.do_sample = True
    student, _ = student_of(teacher, head="causal_lm")
    student.save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert found.eos_token_id == [7, 9, 11] and found.pad_token_id == 5
    assert found.temperature == 0.6 and found.do_sample
    assert student.generation_config is not teacher.generation_config


def test_the_copy_is_a_copy() -> None:
    teacher = pooled_out("bert")
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    student, _ = student_of(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_student_is_trained_in_fp32_whatever_the_teacher_runs_in(dtype: torch.dtype) -> None:
    teacher = pooled_out("bert").to(dtype).requires_grad_(False)
    student, start = student_of(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert start.copied == start.total


def test_an_exported_student_is_read_back_in_eval_mode(tmp_path: Path) -> None:
    student, _ = student_of(pooled_out("bert"))
    student.eval().save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        expected = student(**BATCH).last_hidden_state
        assert torch.equal(loaded(**BATCH).last_hidden_state, expected)


def test_blocks_are_computed_again_without_a_warning_or_the_model_is_refused() -> None:
    model = tiny_model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        recompute_blocks(model)
    assert model.is_gradient_checkpointing
    said = "gradient_checkpointing is true, but CTRLModel of transformers can't compute its blocks"
    with pytest.raises(UserError, match=said):
        recompute_blocks(family_model("ctrl"))
