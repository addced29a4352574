"""A student in bf16 is the model that transformers loads in bf16, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_recipe
from transformers import AutoModel

from benchmarks.family_models import family_model
from fastkd.capture import capture_keywords
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.models.half import check_rounding, round_buffers, round_parameters
from fastkd.recipe import load_recipe
from fastkd.training.setup import set_up

BF16 = torch.bfloat16
# rotary frequencies, and buffers that are multiplied with states as they stand
FAMILIES = [
    *("bert", "llama", "modernbert", "gemma2", "xglm", "openai-gpt", "minimax", "deepseek_v3"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_and_states_are_those_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=BF16).eval()
    round_buffers(model)
    round_parameters(model)
    expected = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name
    ids = torch.arange(2 * 20).view(2, 20) % 30 + 2
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, **capture_keywords(m))[0] for m in (model, loaded))
    assert ours.dtype == BF16 and torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", [{}, {"wall_clock_breakdown": False}])
def test_a_student_that_trains_in_bf16_turns_by_the_teachers_angles(
    engine: dict[str, Any], tmp_path: Path
) -> None:
    train, student = {"precision": "bf16"}, {"hidden_size": 32, "intermediate_size": 64}
    recipe = make_recipe(tmp_path, "llama", train=train, student=student, deepspeed=engine)
    with joined_ranks() as ranks:
        run = set_up(load_recipe(recipe), ranks, progress=False)
        teacher = run.teacher_model
        assert teacher is not None
        student = run.module.student
        for model in (student, teacher):
            assert model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(student.rotary_emb.inv_freq, teacher.rotary_emb.inv_freq)
        assert {parameter.dtype for parameter in student.parameters()} == {BF16}


def test_parameters_that_stay_whole_are_refused() -> None:
    check_rounding(family_model("deepseek_v3"))
    said = r"^train.precision is bf16, but Ernie4_5_MoeModel keeps \S+ in fp32, of \d+ parameters"
    with pytest.raises(UserError, match=said):
        check_rounding(family_model("ernie4_5_moe"))
