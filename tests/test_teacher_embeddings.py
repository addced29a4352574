"""A teacher's embeddings, stored once: one vector a sequence, in place of a teacher that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, keys, make_recipe, read_weights, run_variants

from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_recipe
from fastkd.training.finite import teacher_fault
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher import TeacherRunner
from fastkd.training.teacher_cache.layout import Field
from fastkd.training.teacher_cache.plan import CachePlan, Form, plan_for_run

LOSSES = {"embedding_output": {}, "attention": None, "hidden": None, "embedding": None}


@pytest.fixture
def ranks() -> Any:
    yield start_ranks()
    stop_ranks()


def planned(folder: Path, ranks: Ranks, form: str, **losses: Any) -> tuple[Run, CachePlan]:
    teacher = {"cache": form, "cache_folder": str(folder / "states")}
    recipe = make_recipe(folder, teacher=teacher, losses={**LOSSES, **losses})
    run = set_up(load_recipe(recipe), ranks, progress=False)
    plan = plan_for_run(run)
    assert plan is not None
    return run, plan


@pytest.mark.parametrize(
    ("form", "each"), [("exact", 4 * 32), ("bfloat16", 2 * 32), ("float16", 64), ("int8", 32 + 4)]
)
def test_one_vector_a_row_is_stored_and_the_teacher_runs_no_more(
    tmp_path: Path, ranks: Ranks, form: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = planned(tmp_path, ranks, form)
    assert [(field.name, field.shape) for field in plan.layout.fields] == [("embedding", (32,))]
    assert plan.size == plan.sizes[Form(form)] == each * run.datamodule.rows
    plan.use(run, progress=False)
    assert plan.size == sum(path.stat().st_size for path in plan.folder.glob("*.bin"))
    assert isinstance(run.teacher, TeacherRunner)
    batches = run.micro_batches().next_step(0)
    expected = [run.teacher.record(batch).embedding for batch in batches]
    monkeypatch.setattr(run.teacher.model, "forward", None)
    for batch, vectors in zip(batches, expected, strict=True):
        states = run.teacher(batch)
        assert states.outputs is None and states.embedding is not None and vectors is not None
        largest = vectors.abs().amax(dim=1, keepdim=True)
        bound = {
            "exact": 2e-6 * largest,
            "bfloat16": vectors.abs() * 2**-8 + 2e-6 * largest,
            "float16": vectors.abs() * 2**-11 + 2e-6 * largest,
            "int8": largest * (0.5 + 1e-3) / 127,
        }[form]
        assert ((states.embedding - vectors).abs() <= bound).all()


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    vectors = torch.randn(50, 1, 24, generator=torch.Generator().manual_seed(0))
    vectors[3], vectors[4] = 0, 1e-30
    field = Field("embedding", None, (24,), torch.float32, torch.int8)
    stored = field.encoded(vectors)
    assert stored.dtype == torch.int8 and stored.shape == (50, 1, field.entry_bytes)
    off = (field.decoded(stored) - vectors).abs()
    steps = vectors.abs().amax(dim=-1, keepdim=True) / 127
    assert (off <= steps * 0.5001).all() and off.max() > 0.4 * steps.max()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [29, 30, 31, 32])
def test_eight_bits_of_any_width_are_read_row_by_row(width: int, rows: int) -> None:
    vectors = torch.randn(rows, 1, width, generator=torch.Generator().manual_seed(0))
    field = Field("embedding", None, (width,), torch.float32, torch.int8)
    steps = vectors.abs().amax(dim=-1, keepdim=True) / 127
    expected = (vectors / steps).round() * steps
    torch.testing.assert_close(field.decoded(field.encoded(vectors)), expected)


def test_a_run_learns_from_stored_vectors_what_it_learns_from_a_teacher(tmp_path: Path) -> None:
    """As much up to the rounding of other batches, and in int8 up to that of the vectors."""
    recipe = make_recipe(tmp_path, losses=LOSSES)
    given = {"none": "none", "exact": "exact", "again": "exact", "int8": "int8"}
    variants = [
        keys({"teacher.cache": form, "run.output": str(tmp_path / name)})
        + keys({"teacher.cache_folder": str(tmp_path / "states")})
        for name, form in given.items()
    ]
    said = run_variants(recipe, variants)
    assert said.count("is filled before the first step") == 2 and said.count("is there") == 1
    none, exact, again, int8 = (tmp_path / name for name in given)
    assert_same_run(exact, none, losses=1e-5, weights=1e-4)
    assert_same_run(again, exact, losses=0, weights=0)
    # off by half a step of 1/127 of the largest number at most
    assert_same_run(int8, none, losses=1 / 127, weights=5e-3)
    assert any(not torch.equal(w, read_weights(none)[n]) for n, w in read_weights(int8).items())


def test_states_of_tokens_have_no_eight_bits(tmp_path: Path, ranks: Ranks) -> None:
    message = "teacher.cache is int8, which stores embeddings alone, but the losses read hidden-2"
    with pytest.raises(UserError, match=message):
        planned(tmp_path, ranks, "int8", hidden={})


def test_another_pooling_has_another_folder(tmp_path: Path, ranks: Ranks) -> None:
    folders = {
        planned(tmp_path, ranks, "exact", embedding_output={"pooling": pooling})[1].folder
        for pooling in (None, "cls", "last")
    }
    assert len(folders) == 3


def test_what_another_loss_reads_of_the_outputs_stays(tmp_path: Path, ranks: Ranks) -> None:
    _, plan = planned(tmp_path, ranks, "exact", rkd={})
    assert {field.name for field in plan.layout.fields} == {"embedding", "outputs"}


def test_a_teacher_whose_embedding_is_not_finite_is_named(tmp_path: Path, ranks: Ranks) -> None:
    run, _ = planned(tmp_path, ranks, "exact")
    assert isinstance(run.teacher, TeacherRunner)
    batches = run.micro_batches().next_step(0)
    assert teacher_fault(run.teacher, batches, ranks) is None
    run.teacher.model.encoder.layer[-1].output.LayerNorm.bias.data[0] = torch.nan
    assert teacher_fault(run.teacher, batches, ranks) == "the embedding"
