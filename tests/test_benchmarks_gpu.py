"""`python -m benchmarks.gpu` without a GPU: a dry run of all of it, and what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny_runs import run_script
from torch.autograd import DeviceType

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import recorder, report, tests
from benchmarks.gpu.environment import version_of
from benchmarks.gpu.stages import STAGES, Stage, limit_of, run_stages
from benchmarks.training_step import MARK, TINY, counted, make_inputs, make_steps

MODULES = {
    "works": "record.note(answer=42)\nrecord.skip('the hard part: no time')",
    "breaks": "record.note(answer=43)\nraise RuntimeError('it broke')",
    "vanishes": "import os\nos._exit(3)",
    "attempts": "record.attempt('first', lambda: 1 / 0)\nrecord.note(second=2)",
    "hangs": "import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
    "record.note(child=child.pid)\ntime.sleep(60)",
    "refuses": "record.skip('no such tool')",
}


@pytest.fixture
def stage_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a stage of a module that stands in another part of the namespace `benchmarks.gpu`."""
    folder = tmp_path / "more" / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    for name, body in MODULES.items():
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (folder / f"{name}.py").write_text(f"def run(record):\n{lines}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"))

    def make(name: str, share: float = 1.0, *needs: str) -> Stage:
        return Stage(name, share, needs)

    return make


def results_of(out: Path, *names: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"{name}.json").read_text()) for name in names]


def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # a busy machine is no failure
    options = ["--device", "cpu", "--budget", "1800"]
    options += ["--case", "attention_score_mse llama", "--case", "hidden_mse bert"]
    done = run_script("forked_throughout.py", "benchmarks.gpu", "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(out, *(stage.name for stage in STAGES))
    assert [result["status"] for result in results] == ["done"] * len(STAGES)
    page = (out / "gpu-cpu.md").read_text()
    for said in (
        f"torch {torch.__version__}",
        "1 passed, 0 failed",
        "attention_score_mse llama-like-2048 x1",
        "hidden_mse bert-base-to-tinybert-4 x4, definition",
        "2 x 16, padded | output_attentions",
        "made 12 steps. Killed after step ",
        "indexer_divergence, logits_divergence, relation_divergence",
        "compute-sanitizer: a dry run",
    ):
        assert said in page, said


def test_a_stage_that_fails_is_recorded_and_the_next_one_run(stage_of: Any, tmp_path: Path) -> None:
    names = ("breaks", "vanishes", "attempts", "works", "refuses")
    chosen = [*map(stage_of, names), stage_of("works_not", 1.0, "no_such_package")]
    assert not run_stages(chosen, tmp_path, "cpu", 60.0)
    breaks, vanishes, attempts, works, refuses, absent = results_of(tmp_path, *names, "works_not")
    assert (breaks["status"], breaks["found"]) == ("failed", {"answer": 43})
    assert "exit code 1" in breaks["problems"][0] and "it broke" in breaks["problems"][0]
    assert "exit code 3" in vanishes["problems"][0]
    # what fails inside a stage fails it, and the stage goes on
    assert (attempts["status"], attempts["found"]) == ("failed", {"second": 2})
    assert attempts["problems"] == ["first: ZeroDivisionError: division by zero"]
    assert (works["status"], works["found"]) == ("done", {"answer": 42})
    assert (refuses["status"], refuses["skipped"]) == ("skipped", ["no such tool"])
    assert (absent["status"], absent["problems"]) == ("skipped", [])
    assert absent["skipped"] == ["not installed: no_such_package"]


def test_a_stage_that_outruns_its_share_is_ended_with_all_that_it_started(
    stage_of: Any, tmp_path: Path
) -> None:
    assert not run_stages([stage_of("hangs"), stage_of("works", 4.0)], tmp_path, "cpu", 20.0)
    hangs, works = results_of(tmp_path, "hangs", "works")
    assert (hangs["status"], works["status"]) == ("failed", "done")
    assert hangs["limit_seconds"] == 4.0 and hangs["seconds"] < 12.0
    # where it was
    assert "took longer than its 4 seconds" in hangs["problems"][0]
    assert "in run" in hangs["problems"][0]
    child = hangs["found"]["child"]
    dead = not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    assert dead


def test_what_a_stage_leaves_the_next_ones_get() -> None:
    chosen = [Stage("a", 1.0), Stage("b", 2.0), Stage("c", 1.0)]
    assert limit_of(100.0, chosen) == 25.0
    assert limit_of(90.0, chosen[1:]) == 60.0
    assert limit_of(70.0, chosen[2:]) == 70.0
    assert {stage.name for stage in STAGES} >= set(report.SECTIONS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "0"], "--budget is 0 seconds; give more than 0"),
        (["--budget", "-3"], "--budget is -3 seconds"),
        (["--out", "{folder}/others"], "holds other files; give a new folder"),
        (["--out", "{folder}/others/notes.txt"], "is a file; give a folder"),
        (["--out", "{folder}/ours", "--only", "tests"], "has results of --device cuda"),
        (["--device", "cuda"], "no CUDA device is there; --device cpu makes a dry run"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for folder, name, text in (("others", "notes.txt", ""), ("ours", "tests.json", '"cuda"')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(f'{{"device": {text}}}')
    given = [argument.format(folder=tmp_path) for argument in arguments]
    defaults = ["--out", str(tmp_path / "new"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gpu", *defaults, *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "new").exists()


def test_outcomes_of_tests_are_counted_also_of_a_run_that_was_ended(tmp_path: Path) -> None:
    lines = [
        {"test": "a", "outcome": "passed", "seconds": 3.0, "said": ""},
        {"test": "b", "outcome": "failed", "seconds": 1.0, "said": "assert 1 == 2"},
        {"test": "c", "outcome": "skipped", "seconds": 0.0, "said": "no time"},
        {"test": "d", "outcome": "skipped", "seconds": 0.0, "said": "no time"},
    ]
    path = tmp_path / "tests.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in [{"collected": 9}, *lines])
    path.write_text(whole + '{"test": "half')
    found = tests.counted(path)
    assert found["collected"] == 9
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 2)
    assert found["failures"] == {"b": "assert 1 == 2"}
    assert found["reasons"] == {"no time": 2}
    assert next(iter(found["slowest"])) == "a"
    assert tests.counted(tmp_path / "none")["passed"] == 0


def test_one_line_of_what_pytest_says() -> None:
    assert recorder.said(("file.py", 3, "Skipped: needs a CUDA device")) == "needs a CUDA device"
    assert recorder.said("Traceback\n  x\nModuleNotFoundError: no x\n") == (
        "ModuleNotFoundError: no x"
    )


def test_tests_of_a_gpu_are_found_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.name for path in tests.device_tests("cuda")}
    assert {
        "test_kernels_triton.py",
        "test_kernels_capture.py",
        "test_gpu_runs.py",
        "test_graphs.py",
        "test_host_reads.py",
    } <= names
    # on a GPU these do what they do without one
    assert not names & {"test_kernels_compile.py", "test_kernels_properties.py"}
    runs = tests.TESTS / "test_gpu_runs.py"
    assert tests.missing(runs) == set()
    found = tests.find_spec
    monkeypatch.setattr(tests, "find_spec", lambda name: None if name == "yaml" else found(name))
    # imported by a helper of a helper
    assert tests.missing(runs) == {"yaml"}
    absent = {"yaml", "datasets"}
    monkeypatch.setattr(tests, "find_spec", lambda name: None if name in absent else found(name))
    # imported by what a test imports of fastkd
    assert tests.missing(runs) == absent
    assert version_of("no-such-distribution") is None


def test_padded_inputs_count_their_tokens_alone() -> None:
    inputs = make_inputs(2, 16, "cpu", padded=True)
    mask = inputs["attention_mask"]
    assert mask.sum(1).tolist() == [2, 16]
    assert not inputs["input_ids"][mask == 0].any()
    whole = make_inputs(2, 16, "cpu")
    padding = {**whole, "attention_mask": torch.ones_like(whole["input_ids"])}
    for name, step in make_steps(padding, TINY).items():
        torch.testing.assert_close(step(), make_steps(whole, TINY)[name]())


def test_a_profile_is_counted_without_what_is_not_of_the_step() -> None:
    def event(name: str, start: float, *, on: str = "CPU", marked: bool = False) -> Any:
        return SimpleNamespace(
            name=name,
            device_type=getattr(DeviceType, on),
            device_time=3.0,
            time_range=SimpleNamespace(start=start, end=start + 100),
            is_user_annotation=marked,
        )

    events = [
        event(MARK, 0, marked=True),
        event("Optimizer.step", 10, marked=True),
        event("triton_fused", 20),
        event("cudaStreamSynchronize", 90),
        # the one that waits for the profile
        event("cudaDeviceSynchronize", 120),
        event(MARK, 5, on="CUDA", marked=True),
        event("Optimizer.step", 15, on="CUDA"),
        event("triton_fused", 130, on="CUDA"),
        event("triton_fused", 140, on="CUDA"),
        event("Memcpy DtoH (Device -> Pageable)", 150, on="CUDA"),
    ]
    assert counted(events) == {
        "busy milliseconds": 0.009,
        "launches": 3,
        "synchronisations": 1,
        "copies to the host": 1,
        "kernels": {"triton_fused": 6.0, "Memcpy DtoH (Device -> Pageable)": 3.0},
    }


def kernel_case() -> dict[str, Any]:
    return {
        "microseconds": 120.5,
        "replayed_microseconds": 130.0,
        "floor_microseconds": 60.2,
        "share_of_floor": 0.5,
        "host_microseconds": 900,
        "times_the_op": {"definition": 4.5, "liger": 2.25},
        "peak_megabytes": 12.5,
        "kernels": {"_fwd_kernel": 100.0, "_bwd_kernel": 20.5},
    }


def test_the_page_stands_by_itself(tmp_path: Path) -> None:
    results = {
        "environment": {
            "gpu": "NVIDIA H100 80GB HBM3",
            "versions": {"torch": "2.11"},
            "driver": "5",
        },
        "tests": {
            "files": 2,
            "collected": 9,
            "passed": 7,
            "failed": 1,
            "skipped": 0,
            "failures": {"tests/a.py::b[x]": "assert a | b"},
            "reasons": {},
        },
        "kernel_times": {
            "copy_gigabytes_per_second": 2980.0,
            "teraflops": 791.0,
            "cases": {"op x4": kernel_case(), "op that failed": {}},
        },
    }
    problems = {"tests": ["1 of the tests failed"]}
    for name, found in results.items():
        result = {
            "status": "failed" if name in problems else "done",
            "seconds": 3.4,
            "limit_seconds": 20.0,
            "problems": problems.get(name, []),
            "skipped": ["beside Liger: not there"] if name == "kernel_times" else [],
            "found": found,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    path = report.write_page(tmp_path)
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.md"
    page = path.read_text()
    for said in (
        "# fastkd on NVIDIA H100 80GB HBM3",
        "torch 2.11, driver 5",
        "| tests | failed | 3 | 20 |",
        "7 passed, 1 failed, 0 skipped, of 9 in 2 files.",
        "| `tests/a.py::b[x]` | assert a \\| b |",
        "| op x4 | 120.5 | 130.0 | 60.2 | 50% | 900 | 4.5 |  | 2.25 | 12.5 |",
        "`_fwd_kernel` 100.0, `_bwd_kernel` 20.5",
        "| kernel_times | beside Liger: not there |",
        "## Failed\n\n| stage | because |\n| --- | --- |\n| tests | 1 of the tests failed |",
    ):
        assert said in page, said
    assert "## Training steps" not in page
