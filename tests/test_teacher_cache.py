"""States of the teacher, stored by row: what is read is what the teacher would have left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from tiny_runs import assert_same_run, make_recipe, read_weights, run_variants
from tiny_training import save_classifier, summary_of, write_recipe, write_task
from transformers import AutoModelForCausalLM

from fastkd.capture import Capture
from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_recipe
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.layout import fields_of
from fastkd.training.teacher_cache.plan import CachePlan, check_room, plan_cache
from fastkd.training.teacher_cache.states import Rows

LOSSES = {
    "attention": {},
    "relations": {"layer_map": "last"},
    "hidden": {},
    "embedding": {},
    "logits": {"kind": "kl"},
    "labels": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # no multiple of the batch: an epoch ends within one
    write_task(tmp_path / "task", count=45)
    save_classifier(tmp_path / "classifier")
    return tmp_path


@pytest.fixture
def ranks() -> Any:
    yield start_ranks()
    stop_ranks()


def cached(folder: Path, form: str) -> dict[str, Any]:
    return {
        "model": str(folder / "classifier"),
        "cache": form,
        "cache_folder": str(folder / "states"),
    }


def states_of(folder: Path, ranks: Ranks, form: str, **sections: Any) -> tuple[Run, CachePlan]:
    given = {"losses": LOSSES, **sections}
    path = write_recipe(folder, "run", teacher=cached(folder, form), **given)
    run = set_up(load_recipe(path), ranks, progress=False)
    plan = plan_cache(run, form)
    assert plan is not None
    plan.use(run, progress=False)
    return run, plan


def tensors(states: Capture) -> dict[str, torch.Tensor]:
    found = {f"hidden {n}": t for n, t in states.hidden.items()}
    for n, state in states.attention.items():
        found |= {f"query {n}": state.query, f"key {n}": state.key}
        if state.value is not None:
            found[f"value {n}"] = state.value
    assert isinstance(states.logits, torch.Tensor)
    return {**found, "logits": states.logits}


def valid(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Entries of tokens that are no padding."""
    if name == "logits":
        return tensor
    return (tensor.movedim(2, 1) if tensor.ndim == 4 else tensor)[mask]


@pytest.mark.parametrize(("form", "tolerance"), [("exact", 2e-6), ("bfloat16", 2**-8)])
def test_what_is_read_is_what_the_teacher_leaves(
    folder: Path, ranks: Ranks, form: str, tolerance: float
) -> None:
    run, _ = states_of(folder, ranks, form)
    # other batches than those it was filled in, of other lengths
    for step, inputs in enumerate(run.micro_batches().next_step(0)):
        mask = inputs["attention_mask"].bool()
        found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs))
        assert found.keys() == expected.keys(), step
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
            ours, theirs = valid(name, found[name], mask), valid(name, tensor, mask)
            scale = theirs.abs().max()
            assert (ours - theirs).abs().max() <= tolerance * scale, name
            if name != "logits":
                assert not valid(name, found[name], ~mask).any(), "padding is not 0"


def test_exact_holds_the_bits_of_the_pass_that_filled_it(folder: Path, ranks: Ranks) -> None:
    run, _ = states_of(folder, ranks, "exact")
    batches = run.datamodule.micro_batches(8, 0, run.plan, 0)
    (inputs,) = batches.next_step(0)
    mask = inputs["attention_mask"].bool()
    found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs))
    for name, tensor in expected.items():
        assert torch.equal(valid(name, found[name], mask), valid(name, tensor, mask)), name


def test_rows_are_not_mixed_up(folder: Path, ranks: Ranks) -> None:
    run, _ = states_of(folder, ranks, "exact")
    (inputs,) = run.micro_batches().next_step(0)
    wrong = {**inputs, "rows": inputs["rows"].roll(1)}
    found, expected = tensors(run.teacher(wrong)), tensors(run.teacher.record(inputs))
    assert (found["logits"] - expected["logits"]).abs().max() > 1e-3


def test_values_are_stored_only_where_they_are_read(folder: Path, ranks: Ranks) -> None:
    _, plan = states_of(folder, ranks, "exact", losses={"attention": {}})
    assert {field.name.split("-")[0] for field in plan.fields} == {"query", "key"}


def test_states_of_submodules_are_stored_where_they_have_tokens(folder: Path, ranks: Ranks) -> None:
    path = "bert.encoder.layer.1.output"
    named = {"student_module": path, "teacher_module": path}
    run, _ = states_of(folder, ranks, "exact", losses={"hidden": named})
    (inputs,) = run.micro_batches().next_step(0)
    mask = inputs["attention_mask"].bool()
    found, expected = (give(inputs).modules[path] for give in (run.teacher, run.teacher.record))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=2e-6)
    pooled = Capture(modules={"pooler": torch.zeros(2, 8)})
    with pytest.raises(UserError, match=r"^teacher\.cache: pooler .* gives \[2, 8\], expected"):
        fields_of(pooled, (2, 3), None)


def variant(folder: Path, name: str, **changes: Any) -> list[str]:
    given = {"run.output": str(folder / name), **changes}
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


@pytest.mark.parametrize("moving", [False, True])
def test_a_run_reads_what_it_would_have_computed(folder: Path, moving: bool) -> None:
    sections: dict[str, Any] = {"losses": LOSSES}
    if moving:
        sections = {"layer_map": {"kind": "random", "redraw": "step", "seed": 0}}
        sections["losses"] = {"attention": {}, "hidden": {}}
    train = {"steps": 13, "max_grad_norm": 0.5, "checkpoint_every": 4}
    path = write_recipe(folder, "base", teacher=cached(folder, "none"), train=train, **sections)
    exact = {"teacher.cache": "exact"}
    runs = [
        variant(folder, "none"),
        variant(folder, "exact", **exact),
        variant(folder, "cut", **exact, **{"train.micro_batch_size": 2}),
    ]
    run_variants(path, runs)
    assert_same_run(folder / "exact", folder / "none", losses=1e-4, weights=1e-4)
    assert_same_run(folder / "cut", folder / "none", losses=1e-4, weights=1e-4)
    after = [summary_of(folder / name)["after"] for name in ("exact", "none")]
    assert after[0]["score"] == after[1]["score"]
    assert after[0]["losses"] == pytest.approx(after[1]["losses"], rel=1e-4)
    # one folder, whatever the micro-batch
    assert len(list((folder / "states").iterdir())) == 1


def test_a_run_that_is_continued_and_ranks(folder: Path) -> None:
    train = {"steps": 12, "checkpoint_every": 4}
    path = write_recipe(folder, "base", teacher=cached(folder, "exact"), train=train, losses=LOSSES)
    run_variants(path, [variant(folder, "whole"), variant(folder, "stopped")])
    stopped = folder / "stopped"
    for gone in ("summary.json", "checkpoints/latest"):
        (stopped / gone).unlink()
    newest = sorted((stopped / "checkpoints").glob("step*"))[-1]
    shutil.rmtree(newest)
    run_variants(path, [variant(folder, "stopped")])
    ours, theirs = read_weights(stopped), read_weights(folder / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # two ranks fill a folder of their own, which a single one reads
    other = {"teacher.cache_folder": str(folder / "other")}
    run_variants(path, [variant(folder, "two", **other)], ranks=2)
    run_variants(path, [variant(folder, "after", **other)])
    assert_same_run(folder / "two", folder / "whole", losses=1e-4, weights=1e-4)
    assert_same_run(folder / "after", folder / "whole", losses=1e-4, weights=1e-4)


def test_text_is_stored_by_block(tmp_path: Path) -> None:
    teacher = {"cache_folder": str(tmp_path / "states")}
    path = make_recipe(tmp_path, teacher=teacher, train={"steps": 12})
    exact = variant(tmp_path, "exact", **{"teacher.cache": "exact"})
    said = run_variants(path, [variant(tmp_path, "none"), exact])
    assert "teacher cache: exact" in said and "is filled before the first step" in said
    assert_same_run(tmp_path / "exact", tmp_path / "none", losses=1e-4, weights=1e-4)


def test_a_language_model_is_stored_in_front_of_its_head(tmp_path: Path) -> None:
    teacher = {"cache_folder": str(tmp_path / "states")}
    path = make_recipe(
        tmp_path,
        "llama",
        teacher=teacher,
        student={"layers": 2, "head": "causal_lm"},
        losses={"logits": {"kind": "kl"}, "hidden": {"weight": 1}},
        train={"steps": 6},
    )
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path / "teacher")
    exact = variant(tmp_path, "exact", **{"teacher.cache": "exact"})
    run_variants(path, [variant(tmp_path, "none"), exact])
    assert_same_run(tmp_path / "exact", tmp_path / "none", losses=1e-4, weights=1e-4)


def test_damage_is_found_and_mended(
    folder: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    _, plan = states_of(folder, ranks, "exact")
    file = plan.folder / "logits.bin"
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    states_of(folder, ranks, "exact")
    assert f"teacher.cache_folder: {plan.folder} is damaged" in caplog.text
    assert file.read_bytes() == good


def test_who_comes_second_keeps_what_is_there(folder: Path, ranks: Ranks) -> None:
    run, plan = states_of(folder, ranks, "exact")
    inode = plan.folder.stat().st_ino
    # planned before the first had finished
    late = CachePlan(**{**vars(plan), "filled": False})
    late.use(run, progress=False)
    assert plan.folder.stat().st_ino == inode
    assert [path.name for path in plan.folder.parent.iterdir()] == [plan.folder.name]


def test_other_teachers_data_and_losses_have_other_folders(folder: Path, ranks: Ranks) -> None:
    _, plan = states_of(folder, ranks, "exact")
    folders = {plan.folder, states_of(folder, ranks, "bfloat16")[1].folder}
    folders.add(states_of(folder, ranks, "exact", losses={"hidden": {}})[1].folder)
    folders.add(states_of(folder, ranks, "exact", task={"max_length": 16})[1].folder)
    save_classifier(folder / "classifier", seed=1)
    folders.add(states_of(folder, ranks, "exact")[1].folder)
    assert len(folders) == 5


def test_no_room_is_refused_before_anything_is_written(
    folder: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(folder, "run", teacher=cached(folder, "exact"), losses=LOSSES)
    run = set_up(load_recipe(path), ranks, progress=False)
    plan = plan_cache(run, "exact")
    assert plan is not None
    with pytest.raises(UserError, match=r"^teacher\.cache: .* teacher\.cache_limit is 1e-06; rai"):
        check_room(plan, 1e-6)
    usage = shutil.disk_usage(folder)._replace(free=plan.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match=r"^teacher\.cache_folder: .* free; free some, name"):
        check_room(plan, 100)
    assert not (folder / "states").exists()
    # a file system of so many rows as nobody has
    huge = CachePlan(**{**vars(plan), "rows": Rows(plan.rows.offsets * 2**40)})
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"take teacher\.cache=bfloat16"):
        check_room(huge, 1e30)


def test_what_is_not_read_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    tinybert = {"losses.reduction": "tinybert", "teacher.cache": "exact"}
    sharded = {"teacher.placement": "shard", "teacher.cache": "exact"}
    path = write_recipe(folder, "run", losses=LOSSES)
    with pytest.raises(UserError, match=r"losses\.reduction is tinybert.*leave teacher\.cache out"):
        load_recipe(path, variant(folder, "a", **tinybert))
    with pytest.raises(UserError, match="placement is shard"):
        load_recipe(path, variant(folder, "b", **sharded))
    with pytest.raises(UserError, match=r"train\.cuda_graph is on"):
        load_recipe(
            path, variant(folder, "c", **{"train.cuda_graph": True, "teacher.cache": "exact"})
        )
    (tmp_path / "text").mkdir()
    text = make_recipe(tmp_path / "text", data={"streaming": True}, teacher={"cache": "exact"})
    with pytest.raises(UserError, match=r"data\.streaming is on"):
        load_recipe(text)
    masked = {"student": {"layers": 2, "head": "masked_lm"}, "losses": {"mlm": {}, "logits": {}}}
    text = make_recipe(tmp_path / "text", teacher={"cache": "exact"}, **masked)
    with pytest.raises(UserError, match=r"losses\.mlm masks other tokens"):
        load_recipe(text)
