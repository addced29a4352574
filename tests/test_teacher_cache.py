"""States of the teacher, stored by row: what is read is what the teacher would have left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_teacher, tiny_config
from tiny_runs import assert_same_run, make_recipe, read_weights, run_script, run_variants
from tiny_training import save_classifier, summary_of, write_recipe, write_task
from transformers import AutoModelForCausalLM

from fastkd.capture import Capture
from fastkd.data.prefetch import DEPTH, Prefetched
from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import DiskError, UserError
from fastkd.layer_map import Progress
from fastkd.recipe import load_recipe
from fastkd.reporting.console import Reporter
from fastkd.training.evaluate import evaluate
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher import TeacherRunner
from fastkd.training.teacher_cache import forecast
from fastkd.training.teacher_cache.forecast import Costs, describe, verdict
from fastkd.training.teacher_cache.layout import fields_of
from fastkd.training.teacher_cache.plan import CachePlan, Form, check_room, plan_cache
from fastkd.training.teacher_cache.rows import StoredRows
from fastkd.types import LENGTHS, STORED, Inputs

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


EXACT, ROUNDED = Form("exact"), Form("bfloat16")
REMADE, SMALL = Form("exact", "recomputed"), Form("bfloat16", "recomputed")


def planned(folder: Path, ranks: Ranks, form: Form, **sections: Any) -> tuple[Run, CachePlan]:
    given = {"losses": LOSSES, **sections}
    path = write_recipe(folder, "run", teacher=cached(folder, form.precision), **given)
    run = set_up(load_recipe(path), ranks, progress=False)
    return run, plan_cache(run, form)


def states_of(folder: Path, ranks: Ranks, form: Form, **sections: Any) -> tuple[Run, CachePlan]:
    run, plan = planned(folder, ranks, form, **sections)
    plan.use(run, progress=False)
    return run, plan


def tensors(states: Capture) -> dict[str, torch.Tensor]:
    found = {f"hidden {n}": t for n, t in states.hidden.items()}
    for n, state in states.attention.items():
        found |= {f"query {n}": state.query, f"key {n}": state.key}
        if state.value is not None:
            found[f"value {n}"] = state.value
    return found if states.logits is None else {**found, "logits": states.logits}


def valid(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Entries of tokens that are no padding."""
    if name == "logits":
        return tensor
    return (tensor.movedim(2, 1) if tensor.ndim == 4 else tensor)[mask]


@pytest.mark.parametrize(
    ("form", "tolerance"), [(EXACT, 2e-6), (ROUNDED, 2**-8), (REMADE, 2e-6), (SMALL, 2**-7)]
)
def test_what_is_read_is_what_the_teacher_leaves(
    folder: Path, ranks: Ranks, form: Form, tolerance: float
) -> None:
    run, plan = states_of(folder, ranks, form)
    stored = {field.name.split("-")[0] for field in plan.layout.fields}
    remade = form.attention == "recomputed"
    assert stored == {"hidden", "logits"} | (set() if remade else {"query", "key", "value"})
    assert plan.size == sum(path.stat().st_size for path in plan.folder.glob("*.bin"))
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
            if name.split()[0] in stored and name != "logits":
                assert not valid(name, found[name], ~mask).any(), "padding is not 0"


@pytest.mark.parametrize("form", [EXACT, REMADE])
@pytest.mark.parametrize("filled", ["buckets", "none"])
def test_padded_batches_and_rows_without_padding_read_each_others_states(
    folder: Path, ranks: Ranks, form: Form, filled: str
) -> None:
    read = {"buckets": "none", "none": "buckets"}[filled]
    _, first = states_of(folder, ranks, form, task={"padding": filled})
    run, plan = planned(folder, ranks, form, task={"padding": read})
    assert plan.folder == first.folder and plan.filled
    plan.use(run, progress=False)
    (inputs,) = run.micro_batches().next_step(0)
    mask = inputs.get("attention_mask")
    assert mask is None or not mask.all()
    assert mask is not None or len(inputs[LENGTHS].unique()) > 1, "sequences of one length"
    found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        ours, theirs = found[name], tensor
        if mask is not None:
            ours, theirs = (valid(name, one, mask.bool()) for one in (ours, theirs))
        # a packed row is another product than a padded batch
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_half_precision_is_recomputed_from_what_is_stored_to_the_bit(
    folder: Path, ranks: Ranks
) -> None:
    run, plan = planned(folder, ranks, SMALL, train={"steps": 1})
    assert plan.sizes[SMALL] < plan.sizes[ROUNDED] < plan.sizes[EXACT]
    half = run.recipe.model_copy(
        update={"teacher": run.recipe.teacher.model_copy(update={"dtype": "bfloat16"})}
    )
    run = set_up(half, ranks, progress=False)
    plan = plan_cache(run, SMALL)
    assert plan.size == plan.sizes[REMADE]
    plan.use(run, progress=False)
    inputs = in_the_order_of_filling(run)
    mask = inputs["attention_mask"].bool()
    found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs))
    for name, tensor in expected.items():
        assert torch.equal(valid(name, found[name], mask), valid(name, tensor, mask)), name


def in_the_order_of_filling(run: Run) -> Inputs:
    """The batch in which the first rows were stored, with what is stored of them."""
    assert isinstance(run.teacher, TeacherRunner) and run.teacher.stored is not None
    batches = run.datamodule.micro_batches(8, 0, run.plan, 0)
    wanted_at = partial(run.objective.layers, "teacher")
    (inputs,) = run.teacher.stored.reading(batches, wanted_at).next_step(0)
    return inputs


def test_exact_holds_the_bits_of_the_pass_that_filled_it(folder: Path, ranks: Ranks) -> None:
    run, _ = states_of(folder, ranks, EXACT)
    inputs = in_the_order_of_filling(run)
    mask = inputs["attention_mask"].bool()
    found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs))
    for name, tensor in expected.items():
        assert torch.equal(valid(name, found[name], mask), valid(name, tensor, mask)), name


@pytest.mark.parametrize(
    ("form", "passes", "tolerance"), [(EXACT, 0, 0), (REMADE, 0, 1e-5), (ROUNDED, 1, 0)]
)
@pytest.mark.parametrize("padding", ["buckets", "none"])
def test_an_evaluation_reads_what_is_held_out_as_well(
    folder: Path, ranks: Ranks, form: Form, passes: int, tolerance: float, padding: str
) -> None:
    run, plan = planned(folder, ranks, form, task={"padding": padding})
    expected = evaluate(run, judge_teacher=True)
    plan.use(run, progress=False)
    assert isinstance(run.teacher, TeacherRunner)
    calls: list[object] = []
    run.teacher.model.register_forward_hook(lambda *_: calls.append(_))
    found = evaluate(run, judge_teacher=True)
    # of a form that rounds, the teacher runs as without a cache
    batches = len(list(run.datamodule.heldout(run.plan.micro_batch_size, ranks)))
    assert len(calls) == passes * batches
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    assert found.judged == expected.judged and found.teacher == expected.teacher
    assert found.teacher_outputs["dev"].tolist() == expected.teacher_outputs["dev"].tolist()
    assert len(expected.losses) > 5 and len(expected.teacher_outputs["dev"]) > 1


def test_a_teacher_whose_scores_no_loss_reads_is_judged_by_a_pass(
    folder: Path, ranks: Ranks
) -> None:
    run, plan = planned(folder, ranks, EXACT, losses={"hidden": {}})
    expected = evaluate(run, judge_teacher=True)
    plan.use(run, progress=False)
    assert isinstance(run.teacher, TeacherRunner)
    calls: list[object] = []
    run.teacher.model.register_forward_hook(lambda *_: calls.append(_))
    assert evaluate(run).losses == expected.losses and not calls
    assert evaluate(run, judge_teacher=True) == expected and calls


def test_rows_are_not_mixed_up(folder: Path, ranks: Ranks) -> None:
    run, _ = states_of(folder, ranks, EXACT)
    (inputs,) = run.micro_batches().next_step(0)
    wrong = {k: v.roll(1, 0) if k.startswith(STORED) else v for k, v in inputs.items()}
    found, expected = tensors(run.teacher(wrong)), tensors(run.teacher.record(inputs))
    assert (found["logits"] - expected["logits"]).abs().max() > 1e-3


def test_values_are_stored_only_where_they_are_read(folder: Path, ranks: Ranks) -> None:
    _, plan = planned(folder, ranks, EXACT, losses={"attention": {}})
    assert {field.name.split("-")[0] for field in plan.layout.fields} == {"query", "key"}


def test_states_of_submodules_are_stored_where_they_have_tokens(folder: Path, ranks: Ranks) -> None:
    path = "bert.encoder.layer.1.output"
    named = {"student_module": path, "teacher_module": path}
    run, _ = states_of(folder, ranks, EXACT, losses={"hidden": named})
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


def test_a_run_reads_what_it_would_have_computed(folder: Path) -> None:
    train = {"steps": 8, "max_grad_norm": 0.5, "checkpoint_every": 3}
    path = write_recipe(folder, "base", teacher=cached(folder, "none"), train=train, losses=LOSSES)
    exact = {"teacher.cache": "exact"}
    runs = [
        variant(folder, "none"),
        variant(folder, "exact", **exact),
        variant(folder, "remade", **exact, **{"teacher.cache_attention": "recomputed"}),
        variant(folder, "stopped", **exact),
    ]
    said = run_variants(path, runs)
    assert "teacher cache: exact" in said and "is filled before the first step" in said
    for name in ("exact", "remade"):
        assert_same_run(folder / name, folder / "none", losses=1e-4, weights=1e-4)
        after = [summary_of(folder / one)["after"] for one in (name, "none")]
        assert after[0]["score"] == after[1]["score"]
        assert after[0]["losses"] == pytest.approx(after[1]["losses"], rel=1e-4)
    there = {path.name for path in (folder / "states").iterdir()}
    # one folder for each form
    assert len(there) == 2
    stopped = folder / "stopped"
    for gone in ("summary.json", "checkpoints/latest"):
        (stopped / gone).unlink()
    newest = sorted((stopped / "checkpoints").glob("step*"))[-1]
    shutil.rmtree(newest)
    run_variants(path, [variant(folder, "stopped", **exact)])
    ours, theirs = read_weights(stopped), read_weights(folder / "exact")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # two ranks fill a folder in smaller micro-batches, and a single one would read it
    other = {"teacher.cache_folder": str(folder / "other"), "train.micro_batch_size": 2}
    run_variants(path, [variant(folder, "two", **exact, **other)], ranks=2)
    assert_same_run(folder / "two", folder / "exact", losses=1e-4, weights=1e-4)
    assert {path.name for path in (folder / "other").iterdir()} < there


@pytest.mark.parametrize("padding", ["buckets", "none"])
def test_machines_write_no_file_together(folder: Path, padding: str) -> None:
    """What ranks of several machines fill is to the byte what those of one do."""
    path = write_recipe(folder, "base", teacher=cached(folder, "exact"), losses=LOSSES)
    size = {"train.steps": 1, "train.warmup_steps": 0, "train.micro_batch_size": 2}

    def filled(script: str, states: str) -> dict[str, bytes]:
        given = {"teacher.cache_folder": str(folder / states), "task.padding": padding, **size}
        overrides = variant(folder, f"run-{states}", **given)
        done = run_script(script, str(path), json.dumps([overrides]), ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        (made,) = (folder / states).iterdir()
        return {file.name: file.read_bytes() for file in made.iterdir()}

    together = filled("run_recipes.py", "together")
    assert "logits.bin" in together
    assert filled("run_on_machines.py", "apart") == together


@pytest.mark.parametrize("form", [EXACT, REMADE])
def test_a_thread_reads_ahead_what_the_losses_of_its_step_read(
    folder: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    losses = {"attention": {}, "hidden": {}}
    drawn = {"kind": "random", "redraw": "step", "seed": 0}
    run, _ = states_of(folder, ranks, form, losses=losses, layer_map=drawn)
    threads, read = set(), StoredRows.read

    def noted(*given: Any) -> dict[str, torch.Tensor]:
        threads.add(threading.current_thread().name)
        return read(*given)

    monkeypatch.setattr(StoredRows, "read", noted)

    def check(step: int) -> set[str]:
        run.objective.at(Progress(step, feed.epoch))
        (inputs,) = feed.next_step(step)
        mask, wanted = inputs["attention_mask"].bool(), run.objective.layers("teacher")
        found, expected = run.teacher(inputs), run.teacher.record(inputs, wanted)
        assert found.attention.keys() == wanted["attention"]
        assert found.hidden.keys() == wanted["hidden"]
        for name, tensor in tensors(found).items():
            theirs = valid(name, tensors(expected)[name], mask)
            torch.testing.assert_close(valid(name, tensor, mask), theirs, rtol=0, atol=1e-5)
        return {name for name in inputs if name.startswith(STORED)}

    with closing(Prefetched(run.micro_batches(), ranks.device, DEPTH)) as feed:
        # over the end of an epoch
        names = [check(step) for step in range(7)]
        position = feed.state_dict()
        names += [check(step) for step in range(7, 9)]
        # as a window looks at a step again
        feed.load_state_dict(position)
        assert [check(step) for step in range(7, 9)] == names[7:]
    assert len(set(map(frozenset, names))) > 1, "the same layers in every step"
    assert all(thread.startswith("fastkd-data") for thread in threads)


def test_a_disk_that_fails_is_said_at_its_step(folder: Path, ranks: Ranks) -> None:
    run, plan = states_of(folder, ranks, EXACT)
    (plan.folder / "hidden-2.bin").write_bytes(b"")
    said = pytest.raises(DiskError, match=r"hidden-2\.bin can't be read \(it ends at byte \d+\)")
    with closing(Prefetched(run.micro_batches(), ranks.device, DEPTH)) as feed, said:
        feed.next_step(0)


def test_text_is_stored_by_block_and_a_language_model_in_front_of_its_head(tmp_path: Path) -> None:
    path = make_recipe(
        tmp_path,
        "llama",
        teacher={"cache_folder": str(tmp_path / "states")},
        student={"layers": 2, "head": "causal_lm"},
        losses={"logits": {"kind": "kl"}, "hidden": {"weight": 1}},
        train={"steps": 6},
    )
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path / "teacher")
    exact = {"teacher.cache": "exact", "teacher.cache_attention": "recomputed"}
    run_variants(path, [variant(tmp_path, "none"), variant(tmp_path, "exact", **exact)])
    assert_same_run(tmp_path / "exact", tmp_path / "none", losses=1e-4, weights=1e-4)


def test_damage_is_found_and_mended(
    folder: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    _, plan = states_of(folder, ranks, EXACT)
    file = plan.folder / "logits.bin"
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    states_of(folder, ranks, EXACT)
    assert f"teacher.cache_folder: {plan.folder} is damaged" in caplog.text
    assert file.read_bytes() == good


def test_who_comes_second_keeps_what_is_there(folder: Path, ranks: Ranks) -> None:
    run, plan = states_of(folder, ranks, EXACT)
    inode = plan.folder.stat().st_ino
    # planned before the first had finished
    late = CachePlan(**{**vars(plan), "filled": False})
    late.use(run, progress=False)
    assert plan.folder.stat().st_ino == inode
    assert [path.name for path in plan.folder.parent.iterdir()] == [plan.folder.name]


def test_other_teachers_data_and_losses_have_other_folders(
    folder: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {planned(folder, ranks, form)[1].folder for form in (EXACT, ROUNDED, REMADE, SMALL)}
    folders.add(planned(folder, ranks, EXACT, losses={"hidden": {}})[1].folder)
    folders.add(planned(folder, ranks, EXACT, task={"max_length": 16})[1].folder)
    save_classifier(folder / "classifier", seed=1)
    folders.add(planned(folder, ranks, EXACT)[1].folder)
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    folders.add(planned(folder, ranks, EXACT)[1].folder)
    assert len(folders) == 8


def of_all(folder: Path, ranks: Ranks, **sections: Any) -> tuple[Run, CachePlan]:
    """A run that stores what any losses and mapping of layers read."""
    teacher = {**cached(folder, "exact"), "cache_attention": "recomputed", "cache_states": "all"}
    run = set_up(load_recipe(write_recipe(folder, "run", teacher=teacher, **sections)), ranks)
    plan = plan_cache(run, REMADE)
    plan.use(run, progress=False)
    return run, plan


def test_runs_of_other_losses_and_mappings_share_what_all_could_read(
    folder: Path, ranks: Ranks
) -> None:
    # the first reads nothing above its second layer, and fills all the same
    first = {"losses": {"hidden": {}}, "layer_map": "first"}
    drawn = {"kind": "random", "redraw": "step"}
    others: list[dict[str, Any]] = [
        {"losses": LOSSES},
        {"losses": {"logits": {}}},
        {"losses": {"attention": {"kind": "kl"}}, "layer_map": "last"},
        {"losses": {"attention": {}, "hidden": {}}, "layer_map": drawn},
        {"losses": {"hidden": {}}, "layer_map": "emd"},
    ]
    folders = set()
    for number, sections in enumerate([first, *others]):
        run, plan = of_all(folder, ranks, **sections)
        assert plan.filled == (number > 0)
        describe(run, plan, Reporter(silent=True))
        folders.add(plan.folder)
        (inputs,) = run.micro_batches().next_step(0)
        wanted = run.objective.layers("teacher")
        mask = inputs["attention_mask"].bool()
        found, expected = tensors(run.teacher(inputs)), tensors(run.teacher.record(inputs, wanted))
        if not run.objective.reads_values:
            expected = {n: tensor for n, tensor in expected.items() if not n.startswith("value")}
        assert expected.keys() <= found.keys() <= expected.keys() | {"logits"}
        for name, tensor in expected.items():
            ours, theirs = valid(name, found[name], mask), valid(name, tensor, mask)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert len(folders) == 1
    assert {field.name for field in plan.layout.fields} == {
        *(f"hidden-{layer}" for layer in range(5)),
        "logits",
    }


def test_what_all_does_not_hold_is_refused(folder: Path, ranks: Ranks) -> None:
    path = "bert.encoder.layer.1.output"
    named = {"hidden": {"student_module": path, "teacher_module": path}}
    with pytest.raises(UserError, match=r"cache_states is all, .* read submodules; set it to read"):
        of_all(folder, ranks, losses=named)
    wrong = {**cached(folder, "exact"), "cache_states": "all"}
    with pytest.raises(UserError, match="cache_states is all, but cache_attention is stored; set"):
        load_recipe(write_recipe(folder, "run", teacher=wrong))


def test_no_room_is_refused_before_anything_is_written(
    folder: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = planned(folder, ranks, EXACT)
    with pytest.raises(UserError, match=r"^teacher\.cache: .* teacher\.cache_limit is 1e-06; rai"):
        check_room(plan, 1e-6)
    usage = shutil.disk_usage(folder)._replace(free=plan.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match=r"^teacher\.cache_folder: .* free; free some, name"):
        check_room(plan, 100)
    assert not (folder / "states").exists()
    # a file system of so many rows as nobody has
    sizes = {form: 2**40 * size for form, size in plan.sizes.items()}
    huge = CachePlan(**{**vars(plan), "sizes": sizes})
    monkeypatch.undo()
    smaller = r"take teacher\.cache=bfloat16 teacher\.cache_attention=recomputed \(\S+ GiB\), or l"
    with pytest.raises(UserError, match=smaller):
        check_room(huge, 1e30)
    (folder / "states").touch()
    with pytest.raises(UserError, match=r"^teacher\.cache_folder .* can't be made \(Not a dir"):
        check_room(plan, 100)


def test_what_pays_is_what_waits_less_than_the_teacher_takes() -> None:
    costs = Costs(teacher=1e-4, recomputing=2e-5, rate=1e9)
    slow, never = replace(costs, recomputing=2e-4), replace(costs, recomputing=None)

    def said(costs: Costs, form: Form, each: float, times: float, filled: bool = False) -> str:
        return verdict(costs, form, each, times, filled=filled)

    assert said(costs, EXACT, 1e4, 5) == said(costs, SMALL, 1e4, 5) == "yes"
    assert said(costs, EXACT, 1e4, 1) == "if shared by runs"
    assert said(costs, EXACT, 1e4, 1, filled=True) == "yes"
    assert said(costs, EXACT, 2e5, 5) == said(slow, SMALL, 1e4, 5) == "no"
    assert said(slow, EXACT, 1e4, 5) == "yes"
    assert said(never, SMALL, 1e4, 5) == "can't be made"
    assert said(replace(costs, rate=None), EXACT, 1e4, 5) == "unknown"


def test_a_filled_place_that_nobody_may_write_to_is_measured_by_what_is_there(
    folder: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run, _ = states_of(folder, ranks, EXACT)
    plan = plan_cache(run, EXACT)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for least, said in ((1, " GB/s"), (1 << 40, "can't be measured, as nothing may be written")):
        monkeypatch.setattr(forecast, "_PROBE_BYTES", least)
        check_room(plan, 100)
        describe(run, plan, Reporter())
        words = " ".join(capsys.readouterr().out.split())
        assert said in words and ("unknown" in words) == (least > 1)


def test_narrow_heads_take_no_less_room_when_they_are_recomputed(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(
        tmp_path,
        teacher={"cache_folder": str(tmp_path / "states")},
    )
    # queries 4 x 4 and keys 2 x 4, below them 32 numbers
    save_teacher(tmp_path / "teacher", "qwen3", head_dim=4)
    changes = ["losses.hidden=null", "losses.embedding=null"]
    run = set_up(load_recipe(path, changes), ranks, progress=False)
    plan = plan_cache(run, REMADE)
    each = {form: plan.sizes[form] / plan.rows.tokens for form in plan.sizes}
    assert each == {EXACT: 4 * 2 * 24, REMADE: 4 * 2 * 32, ROUNDED: 2 * 2 * 24, SMALL: 2 * 2 * 32}
    describe(run, plan, Reporter())
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    found = [line for line in lines if "no smaller" in line]
    assert len(found) == 2 and found == [line for line in lines if "attention recomputed" in line]


def test_ranks_of_a_machine_share_its_disk(
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(forecast, "disk_rate", lambda _plan: 6e9)
    rates = []
    monkeypatch.setattr(forecast, "verdict", lambda costs, *_, **__: rates.append(costs.rate) or "")
    path = make_recipe(tmp_path, teacher={"cache_folder": str(tmp_path / "states")})
    run = set_up(load_recipe(path), ranks, progress=False)
    plan = plan_cache(run, EXACT)
    for here, said in (
        (1, "by a disk of 6 GB/s"),
        (4, "by a disk of 1.5 GB/s for each of 4 ranks"),
    ):
        monkeypatch.setattr(Ranks, "here", here)
        describe(run, plan, Reporter())
        words = " ".join(capsys.readouterr().out.split())
        assert said in words and ("for each of" in words) == (here > 1)
    assert set(rates) == {6e9, 1.5e9}


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
