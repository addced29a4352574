"""A student in bf16 is the model that transformers loads in bf16, to the bit, or it is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_recipe
from transformers import AutoModel, LlamaPreTrainedModel

from benchmarks.family_models import family_model
from fastkd.capture import capture_keywords
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.models.half import check_rounding, round_buffers, round_parameters
from fastkd.recipe import load_recipe
from fastkd.training.setup import set_up

BF16 = torch.bfloat16
# rotary frequencies, and buffers that are multiplied with states as they stand; the last two keep
# parameters in fp32, by name and by how they are made, as deepseek_v3 does from transformers 5.24
FAMILIES = [
    *("bert", "llama", "modernbert", "gemma2", "xglm", "openai-gpt", "minimax", "deepseek_v3"),
    *("ernie4_5_moe", "hunyuan_v1_moe"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_in_bf16_is_the_loaded_model_or_refused(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=BF16).eval()
    round_buffers(model)
    expected = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name
    whole = [name for name, parameter in loaded.named_parameters() if parameter.dtype != BF16]
    if whole:
        said = f"{type(model).__name__} keeps {whole[0]} in fp32, of {len(whole)} parameters; set "
        with pytest.raises(UserError, match=re.escape(f"train.precision is bf16, but {said}")):
            check_rounding(model)
        return
    check_rounding(model)
    round_parameters(model)
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


@pytest.mark.parametrize("engine", [{}, {"wall_clock_breakdown": False}])
def test_either_engine_refuses_what_stays_whole(
    engine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["o_proj"])
    recipe = make_recipe(tmp_path, "llama", train={"precision": "bf16"}, deepspeed=engine)
    said = r"LlamaModel keeps layers\.0\.self_attn\.o_proj\.weight in fp32, of 2 parameters; set"
    with joined_ranks() as ranks, pytest.raises(UserError, match=said):
        set_up(load_recipe(recipe), ranks, progress=False)
