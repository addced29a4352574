"""The command line: what a user sees when all is well, and one line when it is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import VOCABULARY, save_teacher, tiny_tokenizer
from tiny_runs import make_recipe, run_command, run_script, run_variants
from transformers import AutoModel, XLNetConfig

from fastkd import cli
from fastkd.cli import main
from fastkd.distributed import start_ranks


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


def _fastkd(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fastkd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    return code if isinstance(code, int) else 1


def _empty_corpus(recipe: Path) -> list[str]:
    (recipe.parent / "corpus.txt").write_text("\n\n")
    return []


def _another_tokenizer(recipe: Path) -> list[str]:
    tiny_tokenizer(VOCABULARY + 2).save_pretrained(recipe.parent / "teacher")
    return []


def _not_a_model(recipe: Path) -> list[str]:
    (recipe.parent / "empty").mkdir()
    return [f"teacher.model={recipe.parent / 'empty'}"]


def _outside_the_interface(recipe: Path) -> list[str]:
    # XLNet computes its attention itself
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=4, n_head=4, d_inner=64)
    AutoModel.from_config(config).save_pretrained(recipe.parent / "teacher")
    return []


def _damaged_weights(recipe: Path) -> list[str]:
    return [f"teacher.sha256={'a' * 64}"]


def _taken_folder(recipe: Path) -> list[str]:
    run = recipe.parent / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("precious: true\n")
    return []


def _foreign_folder(recipe: Path) -> list[str]:
    run = recipe.parent / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("precious\n")
    return []


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown key": (lambda _: ["train.stepz=3"], "did you mean 'steps'?"),
    "unknown section": (lambda _: ["trian.steps=3"], "did you mean 'train'?"),
    "wrong type": (lambda _: ["train.steps=many"], "train.steps: input should be a valid integer"),
    "missing corpus": (lambda _: ["data.train=nowhere.txt"], "nowhere.txt"),
    "empty corpus": (_empty_corpus, "corpus.txt"),
    "other head count": (
        lambda _: ["student.heads=2", "student.hidden_size=24"],
        "the student has 2 and the teacher 4; set student.heads=4",
    ),
    "map beyond the last layer": (
        lambda _: ["layer_map=[2,5]"],
        "sends student layer 2 to teacher layer 5, but the teacher's layers are 1 to 4",
    ),
    "deeper than the teacher": (lambda _: ["student.layers=5"], "the teacher has 4 layers"),
    "heads that don't divide": (lambda _: ["student.hidden_size=25"], "not a multiple of its 4"),
    "labels without examples": (
        lambda _: ["losses.labels={}", "student.head=sequence_classification"],
        "losses.labels learns from labelled examples, but data.train is text without labels",
    ),
    "logits without a head": (lambda _: ["losses.logits={}"], "student.head is none; expected"),
    "a teacher without the head": (
        lambda _: ["losses.logits={}", "student.head=causal_lm"],
        "weights are missing, ",
    ),
    "unknown preset": (lambda _: ["preset=tinybrt"], "preset: expected one of tinybert, distilb"),
    "no projection": (lambda _: ["losses.projection=none"], "24 wide and the teacher 32"),
    "blocks beyond the positions": (lambda _: ["data.block_size=100"], "data.block_size"),
    "batch that doesn't divide": (lambda _: ["train.micro_batch_size=3"], "expected a divisor"),
    "DeepSpeed conflict": (
        lambda _: ["deepspeed.gradient_clipping=3"],
        "the recipe decides it by train.max_grad_norm",
    ),
    "attention not installed": (
        lambda _: ["teacher.attention=flash_attention_2"],
        "can't run attention 'flash_attention_2' here",
    ),
    "no model": (_not_a_model, "empty: not loadable"),
    "missing package": (lambda _: ["teacher.model=package:nothing/model"], "not installed"),
    "tokenizer of another model": (_another_tokenizer, "its tokenizer gives 'w65' the id 65"),
    "model outside the interface": (_outside_the_interface, "XLNetModel"),
    "damaged weights": (_damaged_weights, "expected aaaaaa"),
    "folder of another run": (_taken_folder, "already holds a run; continue it with --resume"),
    "folder of something else": (_foreign_folder, "not empty and holds no run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil, expected = BAD[name]
    overrides = spoil(recipe)
    before = _contents(recipe.parent)
    capfd.readouterr()
    assert _fastkd("distill", str(recipe), *overrides, monkeypatch=monkeypatch) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    # the bar of a corpus that was read to its end before the mistake showed
    lines = [line for line in errors if not line.startswith("tokenising")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("fastkd: ")
    assert expected in lines[0]
    after = _contents(recipe.parent)
    assert {path: after.get(path) for path in before} == before


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", [None, "a: [", "- a list\n", "\xff"])
def test_unreadable_recipe(
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert _fastkd("distill", str(path), monkeypatch=monkeypatch) == 2
    assert str(path) in capfd.readouterr().err


def test_deepspeed_launcher_option_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stands before the command, where the launcher puts it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    missing = str(tmp_path / "missing.yaml")
    assert _fastkd("--local_rank=0", "distill", missing, monkeypatch=monkeypatch) == 2
    assert "missing.yaml: not a readable recipe" in capfd.readouterr().err


def test_a_failed_start_does_not_take_the_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The mended recipe runs into the same folder, without --resume."""
    assert _fastkd("distill", str(recipe), "layer_map=[2,9]", monkeypatch=monkeypatch) == 2
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_is_nowhere_and_no_file_of_a_run(closed: str, tmp_path: Path) -> None:
    code = """
import os, sys
sys.argv = ["fastkd", "fields", "train.steps"]
from fastkd.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
from fastkd.reporting.console import Reporter
Reporter().say("a line")
print("another", file=sys.stderr)
with open("made", "w") as file:
    file.write(str(file.fileno() > 2))
"""
    (tmp_path / "said.py").write_text(code)
    command = f'exec "{sys.executable}" said.py {closed}'
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "said.py"] == ["made"]
    assert (tmp_path / "made").read_text() == "True"


def test_full_disk_leaves_earlier_checkpoints_whole(recipe: Path) -> None:
    """No file may grow beyond a limit, which the operating system enforces on every writer."""
    settings = (str(recipe), "train.checkpoint_every=2")
    done = run_script("disturbed_run.py", "disk full from step 3", "0", *settings)
    assert done.returncode == 2, done.stderr[-3000:]
    lines = done.stderr.strip().splitlines()
    assert "step-00000004: writing failed" in lines[-1]
    assert "continue with --resume" in lines[-1]
    resumed = run_command("distill", str(recipe), "train.checkpoint_every=2", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000002" in resumed.stdout


def written(run: Path) -> set[tuple[str, int, float]]:
    """Every number of the metrics."""
    found: set[tuple[str, int, float]] = set()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert datetime.fromisoformat(record.pop("time")).tzinfo is not None
        kind, step = record.pop("kind"), record.pop("step")
        names = {"train": ["loss", "learning_rate", "gradient_norm"], "heldout": ["total"]}[kind]
        assert record.keys() > {f"{kind}/{name}" for name in (*names, "losses/hidden/1-2")}
        # one number a column, but for what has none
        found |= {(k, step, rounded(v)) for k, v in record.items() if v is not None}
    assert {name.split("/")[0] for name, *_ in found} == {"train", "heldout"}
    return found


def tracked(run: Path) -> set[tuple[str, int, float]]:
    """What the tracker was told."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in run.glob("tensorboard/**/events*")}
    told = EventAccumulator(str(folder))
    told.Reload()
    names = told.Tags()["scalars"]
    return {(name, e.step, rounded(e.value)) for name in names for e in told.Scalars(name)}


def rounded(value: float) -> float:
    """As the tracker's fp32 holds it."""
    return float(np.float32(value))


def test_a_run_leaves_what_it_promises(recipe: Path) -> None:
    run = recipe.parent / "run"
    more = ("train.evaluate_every=3", "run.monitor=tensorboard")
    done = run_command("distill", str(recipe), *more, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "layer 0: embeddings" in done.stdout
    assert str(run) in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["total"] < summary["before"]["total"]
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"]
    assert summary["peak_memory_bytes"] > 2**20
    for models in (summary["disk_bytes"], *summary["speed"]["batches"].values()):
        assert models.keys() == {"student", "teacher"}
    assert summary["disk_bytes"]["student"] < summary["disk_bytes"]["teacher"]
    card = (run / "student" / "README.md").read_text()
    assert "| forward of 32 x 16 tokens |" in card and str(recipe.parent) not in card
    assert summary["data_digests"]["train"] in card
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["evaluate_every"] == 3
    heldout = [
        record["step"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "heldout"
    ]
    assert heldout == [0, 3, 6]
    page = (run / "report.html").read_text()
    panels = ["attention, logarithmic", "norm of the gradient, last step, logarithmic"]
    for title in ("Layers", *panels, "learning rate, last step", "tokens a second"):
        assert f">{title}</" in page
    assert tracked(run) == written(run)

    evaluated = run_command("evaluate", str(run), "--output", str(recipe.parent / "numbers.json"))
    assert evaluated.returncode == 0, evaluated.stderr
    numbers = json.loads((recipe.parent / "numbers.json").read_text())
    assert numbers["losses"] == pytest.approx(summary["after"]["losses"], rel=1e-5)
    again = run_command("evaluate", str(run), "--output", str(recipe.parent / "numbers.json"))
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_other_architectures_end_to_end(recipe: Path) -> None:
    """Causal with grouped heads; rotary with local layers; other names for the same numbers."""
    names = ("llama", "modernbert", "distilbert")
    variants = []
    for name in names:
        teacher = save_teacher(recipe.parent / f"{name}-teacher", name)
        settings = ["train.steps=20", "train.learning_rate=0.01"]
        output = f"run.output={recipe.parent / name}"
        variants.append([f"teacher.model={teacher}", output, *settings])
    run_variants(recipe, variants)
    for name in names:
        summary = json.loads((recipe.parent / name / "summary.json").read_text())
        assert summary["after"]["total"] < 0.8 * summary["before"]["total"], name
        model = AutoModel.from_pretrained(recipe.parent / name / "student")
        assert model.config.model_type == name
        assert model.config.hidden_size == 24


def test_doctor_estimates_a_recipe_and_writes_no_run(recipe: Path) -> None:
    one_step = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=1"]
    given = ["student.heads=4", "teacher.cache=exact", *one_step]
    done = run_command("doctor", str(recipe), *given)
    assert done.returncode == 0, done.stderr
    # of some hundred rows one is read, in less than a second
    times = re.findall(r"read (0\.\d+) times", done.stdout)
    assert len(times) == 2 and all(float(share) > 0 for share in times)
    assert "0 min 0 s" not in done.stdout and "read 0.00 times" not in done.stdout
    for expected in (
        "deepspeed",
        "teacher parameters",
        "optimiser",
        "tokens in the corpus",
        "losses",
        "these steps ran the teacher; those of the run take what is stored",
    ):
        assert expected in done.stdout
    assert not (recipe.parent / "run").exists()


def test_a_rank_without_a_gpu_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank, which speaks for all where they fail alike, has one."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cli, "app", lambda **_: start_ranks())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("fastkd: rank 2 of this machine has no GPU of its own")
    assert said.count("\n") == 1
