"""A teacher, a corpus and a recipe small enough to run whole distillations in tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import warm_processes
import yaml
from safetensors.torch import load_file
from tiny_models import save_teacher, write_text
from warm_processes import no_signal_ignored

from fastkd.training.metric_lines import values_of
from fastkd.training.run_folder import RunFolder


def make_recipe(folder: Path, architecture: str = "bert", **sections: dict[str, Any]) -> Path:
    """Write a recipe, its teacher and its corpus into a folder; sections update the defaults."""
    tree: dict[str, Any] = {
        "teacher": {"model": str(save_teacher(folder / "teacher", architecture))},
        "student": {"layers": 2, "hidden_size": 24, "intermediate_size": 48},
        "losses": {
            "attention": {"weight": 1.0},
            "hidden": {"weight": 2.0},
            "embedding": {"weight": 0.5},
        },
        "data": {
            "train": str(write_text(folder / "corpus.txt", documents=60, words=60)),
            "heldout_fraction": 0.2,
            # three batches and one that is not full, twice in every run
            "heldout_blocks": 30,
            "block_size": 16,
            "workers": 0,
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "log_every": 1,
            # small enough that clipping is at work
            "max_grad_norm": 0.5,
        },
        "run": {"output": str(folder / "run")},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_command(
    *arguments: str, ranks: int = 1, gpu: bool = False, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the fastkd command line in a process of its own, or in several ranks.

    On CPUs and from a server that has made the imports, unless `gpu` or `fresh`: then in a new
    interpreter, or in several under torchrun.
    """
    return _run(["-m", "fastkd", *arguments], ranks, gpu, fresh)


def run_script(
    name: str,
    *arguments: str,
    ranks: int = 1,
    gpu: bool = False,
    fresh: bool = False,
    port: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script that stands beside the tests, likewise.

    Ranks without a launcher meet at a port where a store is, or at one of their own.
    """
    return _run([str(Path(__file__).parent / name), *arguments], ranks, gpu, fresh, port)


def run_variants(recipe: Path, variants: list[list[str]], *, ranks: int = 1) -> str:
    """Run or resume a recipe under several lists of overrides in one process; its output."""
    done = run_script("run_recipes.py", str(recipe), json.dumps(variants), ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def refused_variants(recipe: Path, variants: list[list[str]]) -> list[str]:
    """Run a recipe under several lists of overrides that are all refused; the line of each."""
    done = run_script("run_recipes.py", str(recipe), json.dumps(variants))
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads(done.stderr.strip().splitlines()[-1])
    return [said[str(number)] for number in range(len(variants))]


def _run(
    target: list[str], ranks: int, gpu: bool, fresh: bool, port: int | None = None
) -> subprocess.CompletedProcess[str]:
    if not gpu and not fresh:
        return warm_processes.run(target, run_environment(), ranks=ranks, port=port)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *target],
        capture_output=True,
        text=True,
        timeout=300,
        env=run_environment(gpu),
        preexec_fn=no_signal_ignored,
    )


def run_environment(gpu: bool = False) -> dict[str, str]:
    """Environment variables of a process that runs tiny models."""
    # tiny tensors: threads would only wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not gpu:
        # some gradients of a GPU are atomic sums, no two of which agree; no PATH: no compiler is
        # needed
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PATH": "/nonexistent"}
    return environment


def read_losses(run: Path) -> list[dict[str, float]]:
    """The losses of every logged step."""
    lines = RunFolder(run).read_metrics()
    return [values_of(line, "losses") for line in lines if line["kind"] == "train"]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """Student and projections of a finished run."""
    return {
        **load_file(run / "student" / "model.safetensors"),
        **load_file(run / "projections.safetensors"),
    }


def assert_same_run(run: Path, other: Path, *, losses: float, weights: float) -> None:
    """Losses agree relatively, weights absolutely."""
    mine, theirs = read_losses(run), read_losses(other)
    assert len(mine) == len(theirs)
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
        for label in a:
            assert abs(a[label] - b[label]) <= losses * abs(b[label]), (step, label, a, b)
    left, right = read_weights(run), read_weights(other)
    assert left.keys() == right.keys()
    for name in left:
        difference = (left[name] - right[name]).abs().max().item()
        assert difference <= weights, (name, difference)


def keys(values: dict[str, Any]) -> list[str]:
    """Overrides for the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
