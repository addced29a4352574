"""A teacher, a corpus and a recipe small enough to run whole distillations in tests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [a + b for a in ("ka", "lo", "mi", "ne", "su", "ta") for b in ("ra", "ven", "dol", "pit")]


def make_teacher(folder: Path) -> Path:
    """A random 4-layer BERT of width 32 with a word-level vocabulary, in Hugging Face format."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        # spread out, so that attention is not uniform and losses are not tiny
        initializer_range=0.3,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def make_corpus(path: Path, documents: int = 60) -> Path:
    """Documents of random words, one empty line between them."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(40, 90))) for _ in range(documents)]
    path.write_text("\n\n".join(texts) + "\n")
    return path


def make_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a recipe, its teacher and its corpus into a folder; sections update the defaults."""
    tree: dict[str, Any] = {
        "teacher": {"model": str(make_teacher(folder / "teacher"))},
        "student": {"layers": 2, "hidden_size": 24, "intermediate_size": 48},
        "losses": {
            "attention": {"weight": 1.0},
            "hidden": {"weight": 2.0},
            "embedding": {"weight": 0.5},
        },
        "data": {
            "train": str(make_corpus(folder / "corpus.txt")),
            "heldout_fraction": 0.2,
            "block_size": 16,
            "workers": 1,
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


def run_command(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the fastkd command line in a process of its own, or in several under torchrun."""
    return _run(["-m", "fastkd", *arguments], ranks)


def run_script(name: str, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script that stands beside the tests, likewise."""
    return _run([str(Path(__file__).parent / name), *arguments], ranks)


def _run(target: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *target]
    # two cores and tiny tensors: threads would only wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def read_losses(run: Path) -> list[dict[str, float]]:
    """The losses of every logged step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["kind"] == "train"]


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
