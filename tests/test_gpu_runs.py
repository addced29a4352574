"""Whole runs on a GPU, where there is one: as on CPUs but for rounding, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import make_recipe, read_losses, read_weights, run_command, run_script
from tiny_training import save_classifier, write_recipe, write_task

from fastkd.recipe import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exact = {"teacher": {"dtype": "float32"}, "train": {"precision": "fp32", "tf32": False}}
    return make_recipe(tmp_path_factory.mktemp("gpu"), **exact)


def distilled(recipe: Path, name: str, *overrides: str, gpu: bool = True) -> Path:
    folder = recipe.parent / name
    words = "distill", str(recipe), f"run.output={folder}", *overrides
    # not from the server of other tests, which imports what a GPU has no need of
    done = run_command(*words, gpu=gpu, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return distilled(recipe, "whole")


def test_losses_are_those_of_a_cpu(recipe: Path, whole: Path) -> None:
    expected = distilled(recipe, "cpu", gpu=False)
    for ours, theirs in zip(read_losses(whole), read_losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_teacher_in_half_precision_teaches(recipe: Path) -> None:
    folder = distilled(recipe, "half", "teacher.dtype=bfloat16")
    assert all(weight.isfinite().all() for weight in read_weights(folder).values())


@pytest.mark.parametrize("compiles", ["false", "true"])
def test_a_teacher_in_float8_teaches(recipe: Path, compiles: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a CUDA device that multiplies float8")
    option = f"train.compile={compiles}"
    folder = distilled(recipe, f"float8-{compiles}", "teacher.dtype=float8", option)
    expected = distilled(recipe, f"bfloat16-{compiles}", "teacher.dtype=bfloat16", option)
    for ours, theirs in zip(read_losses(folder), read_losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=0.15)


@pytest.mark.parametrize("compiles", ["false", "true"])
def test_recorded_steps_are_the_plain_ones(recipe: Path, whole: Path, compiles: str) -> None:
    options = ["train.cuda_graph=true", f"train.compile={compiles}"]
    folder = distilled(recipe, f"recorded-{compiles}", *options)
    for ours, theirs in zip(read_losses(folder), read_losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_rows_without_padding_are_padded_batches(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    exact = {"precision": "fp32", "tf32": False, "micro_batch_size": 4}
    teacher = {"dtype": "float32"}
    recipe = write_recipe(tmp_path, "run", train=exact, teacher=teacher)
    folders = [distilled(recipe, name, f"task.padding={name}") for name in ("none", "buckets")]
    ours, theirs = map(read_losses, folders)
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("attention", ["stored", "recomputed"])
def test_stored_states_teach_as_the_teacher_does(recipe: Path, whole: Path, attention: str) -> None:
    store = f"teacher.cache_folder={recipe.parent / 'states'}"
    options = [store, "teacher.cache=exact", f"teacher.cache_attention={attention}"]
    folder = distilled(recipe, f"states-{attention}", *options)
    for ours, theirs in zip(read_losses(folder), read_losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_profile_is_that_of_the_gpu(recipe: Path, whole: Path) -> None:
    folder = distilled(recipe, "profiled", "train.profile=true")
    for ours, theirs in zip(read_losses(folder), read_losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    summary = json.loads((folder / "summary.json").read_text())
    phases = summary["profile"]["phases"]
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    for name in ("teacher", "student", "losses", "backward", "optimiser"):
        assert phases[name]["milliseconds"] > 0 and phases[name]["host_milliseconds"] > 0
    parts = summary["profile"]["memory_bytes"]
    assert all(0 < size < summary["peak_memory_bytes"] for size in parts.values())


def test_precision_is_that_of_the_gpu(recipe: Path) -> None:
    distilled(recipe, "auto", "train.precision=auto", "teacher.dtype=auto", "train.tf32=true")
    found = load_recipe(recipe.parent / "auto" / "recipe.yaml", [])
    half = torch.cuda.is_bf16_supported(including_emulation=False)
    assert found.train.precision == ("bf16" if half else "fp32")
    assert found.teacher.dtype == ("bfloat16" if half else "float32")


def test_a_killed_run_goes_on(recipe: Path, whole: Path) -> None:
    folder = recipe.parent / "killed"
    arguments = [f"run.output={folder}", "train.checkpoint_every=2"]
    moment = "between two checkpoints"
    killed = run_script("disturbed_run.py", moment, "0", str(recipe), *arguments, gpu=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    done = run_command("distill", str(recipe), *arguments, "--resume", gpu=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for ours, theirs in zip(read_losses(folder), read_losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_more_ranks_than_gpus_are_one_line(recipe: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    output = recipe.parent / "many"
    done = run_command("distill", str(recipe), f"run.output={output}", ranks=ranks, gpu=True)
    assert done.returncode != 0
    alone = f"rank {ranks - 1} of this machine has no GPU of its own"
    # one GPU is taken for what a scheduler shows each rank
    assert (alone if ranks > 2 else "ranks 0, 1 have one GPU of") in done.stderr
    assert not output.exists()
