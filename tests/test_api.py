"""The commands as functions: same numbers, a result, errors for exits, a process as found."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from tiny_runs import make_recipe, read_weights, run_command
from tiny_training import save_encoder, task_section, write_task
from transformers.utils import logging

import fastkd
from fastkd.cli import main

STEPS = {"train.steps": 3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def result(recipe: Path) -> fastkd.RunResult:
    return run(recipe, "first")


def run(recipe: Path, name: str, **keywords: Any) -> fastkd.RunResult:
    """Of three steps, to a folder beside the recipe."""
    return fastkd.distill(recipe, STEPS, **{"run.output": recipe.parent / name, **keywords})


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import fastkd\n"
        "assert dir(fastkd) and 'distill' in dir(fastkd), dir(fastkd)\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "print(time.perf_counter() - start, sorted(heavy))"
    )
    # the shortest of three: the machine may be busy
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    found = [done.stdout.split(" ", 1) for done in said]
    assert {heavy.strip() for _, heavy in found} == {"[]"}
    assert min(float(seconds) for seconds, _ in found) < 0.2


def test_loading_the_package_draws_no_random_number() -> None:
    code = "import random; random.seed(0); old = random.getstate(); import fastkd.api; "
    code += "print(random.getstate() == old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_every_public_name_is_there() -> None:
    assert all(getattr(fastkd, name) is not None for name in fastkd.__all__)
    assert set(fastkd.__all__) <= set(dir(fastkd))
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        fastkd.destill  # type: ignore[attr-defined]  # noqa: B018


def test_a_result_holds_what_the_folder_holds(result: fastkd.RunResult) -> None:
    summary = json.loads((result.folder / "summary.json").read_text())
    assert result.summary == summary
    assert result.losses_before == summary["before"]["losses"]
    assert result.losses_after == summary["after"]["losses"]
    assert (result.folder / "report.html").is_file()
    weights = read_weights(result.folder)
    found = result.student.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in found if name in weights)
    assert result.student.config.num_hidden_layers == 2 and not result.student.training
    assert result.tokenizer("w7 w8")["input_ids"] == [2, 7, 8, 3]


def test_the_command_line_makes_the_same_run(
    recipe: Path, result: fastkd.RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    again = run(recipe, "second")
    said = capsys.readouterr().out
    done = run_command("distill", str(recipe), "train.steps=3", f"run.output={recipe.parent / 'c'}")
    assert done.returncode == 0, done.stderr
    one, other = read_weights(result.folder), read_weights(recipe.parent / "c")
    assert all(torch.equal(one[name], other[name]) for name in one)
    # twice in a process as once in two; what is said differs in names and times only
    assert again.losses_after == result.losses_after
    assert len(said.splitlines()) == len(done.stdout.splitlines())


def test_quiet_says_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    found = run(recipe, "quiet", quiet=True)
    fastkd.evaluate(found, quiet=True)
    assert capfd.readouterr().out == ""


def test_callbacks_are_told_what_is_written(recipe: Path) -> None:
    steps: list[tuple[int, float]] = []
    evaluations: list[tuple[int, float]] = []
    found = run(
        recipe,
        "callbacks",
        quiet=True,
        on_step=lambda step, record: steps.append((step, record["train/loss"])),
        on_evaluate=lambda step, result: evaluations.append((step, result.total)),
    )
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [(x["step"], x["train/loss"]) for x in lines if x["kind"] == "train"]
    assert evaluations == [(x["step"], x["heldout/total"]) for x in lines if x["kind"] == "heldout"]
    assert [step for step, _ in steps] == [1, 2, 3] and [s for s, _ in evaluations] == [0, 3]


def test_what_a_callback_raises_ends_the_run_which_can_be_resumed(
    recipe: Path, result: fastkd.RunResult
) -> None:
    def fail(step: int, _record: dict[str, Any]) -> None:
        if step == 3:
            raise KeyError("mine")

    every = {"train.checkpoint_every": 1}
    with pytest.raises(KeyError, match="mine"):
        run(recipe, "ended", quiet=True, on_step=fail, **every)
    assert not dist.is_initialized()
    found = run(recipe, "ended", quiet=True, resume=True, **every)
    assert found.losses_after == result.losses_after


def test_a_mapping_and_a_recipe_are_recipes(recipe: Path, result: fastkd.RunResult) -> None:
    tree = yaml.safe_load(recipe.read_text())
    before = json.dumps(tree)
    changed = {"run.output": recipe.parent / "mapping"}
    found = fastkd.distill(tree, {**STEPS, **changed}, quiet=True)
    assert found.losses_after == result.losses_after
    assert json.dumps(tree) == before
    parsed = fastkd.Recipe.model_validate(tree)
    finished = fastkd.distill(parsed, {**STEPS, **changed}, quiet=True, resume=True)
    assert finished.summary == found.summary


def test_an_evaluation_repeats_what_the_run_said(
    result: fastkd.RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fastkd.evaluate(result.folder)
    assert found.losses == result.losses_after
    assert "held-out loss" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"w{i} w{i + 1} " * 20 for i in range(5, 40)))
    changed = fastkd.evaluate(result, {"data.heldout": other}, quiet=True)
    assert changed.losses.keys() == found.losses.keys() and changed.total != found.total


def test_layers_are_inspected(recipe: Path, result: fastkd.RunResult) -> None:
    folder = recipe.parent
    given = folder / "teacher", folder / "teacher", folder / "corpus.txt"
    found = fastkd.inspect_layers(*given, blocks=4, block_size=16)
    assert found.cka.shape == (5, 5) and np.allclose(np.diag(found.cka), 1)
    with torch.autocast("cpu", torch.bfloat16):
        again = fastkd.inspect_layers(*given, blocks=4, block_size=16)
    assert np.array_equal(again.cka, found.cka)


def test_a_model_is_tuned(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    tree = {
        "model": tmp_path / "encoder",
        "task": task_section(tmp_path),
        "train": {"steps": 2, "batch_size": 8},
        "run": {"output": tmp_path / "run"},
    }
    found = fastkd.finetune(tree, quiet=True)
    assert found.student.config.num_labels == 2
    assert found.summary["after"]["score"] == fastkd.evaluate(found, quiet=True).judged["score"]


BAD: dict[str, tuple[Any, Any, str]] = {
    "no file": ("absent.yaml", {}, "absent.yaml: not a readable recipe"),
    "no recipe": (3, {}, "recipe is a int, expected the path of a YAML file, a mapping"),
    "a key that is none": (
        None,
        {"train.stps": 1},
        "train.stps: unknown key; did you mean 'steps'",
    ),
    "an argument that is none": (None, {"resum": True}, "resum: unknown key"),
    "a value that no file holds": (None, {"train.steps": object()}, "override train.steps: "),
    "overrides as a command line has them": (
        None,
        ["train.steps=3"],
        "overrides is a list, expected a mapping of dotted keys to values",
    ),
    "two overrides of one": (
        None,
        {"train.steps": 3, "train": {"steps": 4}},
        "would undo train.steps=3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, overrides, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastkd.UserError, match=said) as refused:
        fastkd.distill(recipe if given is None else given, overrides)
    assert "\n" not in str(refused.value)
    assert not dist.is_initialized() and not list(tmp_path.iterdir())


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a run": (lambda: fastkd.evaluate({"a": 1}), "run is a dict, expected the folder of a fin"),  # type: ignore[arg-type]
    "overrides": (
        lambda: fastkd.evaluate("run", [3]),  # type: ignore[arg-type]
        "overrides is a list, expected a mapping",
    ),
    "a model": (
        lambda: fastkd.inspect_layers(torch.nn.Linear(1, 1), "b", "c"),  # type: ignore[arg-type]
        "teacher is a Linear, expected a hub name, folder",
    ),
    "text": (
        lambda: fastkd.inspect_layers("a", "b", ["c", 3]),  # type: ignore[list-item]
        "data is a int, expected a file, folder, pattern or name, or a list",
    ),
    "no text": (lambda: fastkd.inspect_layers("a", "b", []), "data is empty, expected a file"),
    "blocks": (
        lambda: fastkd.inspect_layers("a", "b", "c", blocks=0),
        "blocks is 0, expected a whole number of at least 1",
    ),
    "kind": (
        lambda: fastkd.inspect_layers("a", "b", "c", kind="l1"),  # type: ignore[arg-type]
        "kind is 'l1', expected one of kl, reverse_kl, js",
    ),
    "a function": (
        lambda: fastkd.distill({}, on_step=3),  # type: ignore[arg-type]
        "on_step is a int, expected a function",
    ),
    "another": (
        lambda: fastkd.finetune({}, on_evaluate="f"),  # type: ignore[arg-type]
        "on_evaluate is a str, expected a function",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_another_type_are_one_line(name: str) -> None:
    call, said = CALLS[name]
    with pytest.raises(fastkd.UserError, match=said):
        call()


def test_a_run_works_in_a_thread(recipe: Path, result: fastkd.RunResult) -> None:
    found: dict[str, Any] = {}

    def work(name: str) -> None:
        try:
            found[name] = run(recipe, name, quiet=True)
        except fastkd.UserError as error:
            found[name] = error

    thread = threading.Thread(target=work, args=("thread",))

    def meanwhile(step: int, _record: dict[str, Any]) -> None:
        if step == 1:
            other = threading.Thread(target=work, args=("other",))
            other.start()
            other.join()

    thread.start()
    thread.join()
    assert found["thread"].losses_after == result.losses_after
    run(recipe, "busy", quiet=True, on_step=meanwhile)
    assert "another run of fastkd is going on in this process" in str(found["other"])


def _state() -> list[Any]:
    """What a run must leave in a process."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        {name: os.environ.get(name) for name in ("LOCAL_RANK", "DS_ACCELERATOR", "RANK")},
        os.environ.get("TOKENIZERS_PARALLELISM"),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        dist.is_initialized(),
        sys.excepthook,
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


@pytest.fixture
def modes() -> Iterator[None]:
    """What a caller may have set, and what no number of fastkd's is to follow."""
    dtype = torch.get_default_dtype()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.set_default_dtype(torch.bfloat16)
        yield
    torch.set_default_dtype(dtype)


def test_a_process_is_left_as_found_and_changes_nothing(
    recipe: Path, result: fastkd.RunResult, modes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    before = _state()
    found = fastkd.distill(recipe, STEPS, quiet=True, **{"run.output": "left"})
    assert _state() == before
    monkeypatch.chdir("/")
    assert found.folder == recipe.parent / "left"
    assert found.losses_after == result.losses_after
    assert fastkd.evaluate(found, quiet=True).losses == result.losses_after
    weights = read_weights(result.folder)
    assert all(torch.equal(w, weights[name]) for name, w in read_weights(found.folder).items())
    tuned = found.student
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert all(p.requires_grad and not p.is_inference() for p in tuned.parameters())


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = fastkd.RunResult(Path("bert"), {})
    for read in (lambda: gone.student, lambda: gone.tokenizer):
        with pytest.raises(fastkd.UserError, match=rf"^{tmp_path}/bert/student is not there; make"):
            read()


def engines() -> set[int]:
    """Which of DeepSpeed's are alive."""
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each).__name__ == "DeepSpeedEngine"}


@pytest.mark.parametrize(("stage", "placement"), [(1, "replicate"), (3, "shard")])
def test_no_engine_of_deepspeed_is_left(recipe: Path, stage: int, placement: str) -> None:
    changes = {"train.zero_stage": stage, "teacher.placement": placement}
    given = {**STEPS, "run.output": recipe.parent / f"sharded-{stage}", **changes}
    before = engines()
    fastkd.distill(recipe, given, quiet=True, deepspeed={"steps_per_print": 100})
    assert engines() <= before


def test_a_callers_process_group_stays(recipe: Path, result: fastkd.RunResult) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        found = run(recipe, "theirs", quiet=True)
        assert dist.group.WORLD is group
        dist.barrier()
    finally:
        dist.destroy_process_group()
    assert found.losses_after == result.losses_after
    # DeepSpeed has let go of the groups that are gone
    assert run(recipe, "after", quiet=True).losses_after == result.losses_after


def test_from_the_command_to_the_op_is_a_short_way(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastkd.losses import attention

    stacks: list[list[traceback.FrameSummary]] = []
    original = attention.attention_score_mse

    def seen(*arguments: Any, **keywords: Any) -> Any:
        stacks.append([f for f in traceback.extract_stack() if "/fastkd/" in f.filename])
        return original(*arguments, **keywords)

    monkeypatch.setattr(attention, "attention_score_mse", seen)
    output = f"run.output={recipe.parent / 'frames'}"
    monkeypatch.setattr(sys, "argv", ["fastkd", "distill", str(recipe), "train.steps=3", output])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    stack = next(s for s in stacks if any(f.name == "train_step" for f in s))
    # a comprehension is a frame of its own before Python 3.12
    names = [f.name for f in stack if not f.name.startswith("<")]
    # `main` holds the command, and the op is called last
    assert len(names) - 1 + 1 <= 8, [(f.name, f.filename) for f in stack]
    files = {f.filename for f in stack}
    assert len(files) + 1 <= 5, files
