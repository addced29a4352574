"""Set what must be set before torch, triton or transformers are imported; tell slow tests apart."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tests are the same on every machine; `make gpu` asks for those of a GPU
if os.environ.get("FASTKD_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

# triton reads TRITON_INTERPRET once, when it is imported; transformers and deepspeed import it too
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    from quick_interpreter import make_quick

    make_quick()

# large tensors stay on glibc's heap: pages that go back come anew, a third of some tests' time
with contextlib.suppress(AttributeError, OSError):
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    for option, size in ((-3, 10**9), (-1, 2 * 10**9)):
        ctypes.CDLL(None).mallopt(option, size)

# imports make nothing but what stays, and a run little that only a collection finds
gc.set_threshold(10_000, 20, 20)

# tiny tensors on few cores: threads would mostly wait for each other
torch.set_num_threads(1)

# a test that gets to one of these, also through its fixtures, starts processes of its own
STARTERS = {
    "run_command",
    "run_script",
    "start_ranks",
    "Launcher",
    "run_study",
    "subprocess",
    "multiprocessing",
}
# files of kernels, models and fuzz that take minutes; a test that is slow alone has the mark
SLOW_FILES = {
    "test_capture",
    "test_capture_traits",
    "test_conditioning",
    "test_data_streams",
    "test_documentation_python",
    "test_export_poolers",
    "test_export_sentences",
    "test_families",
    "test_fuzz_files",
    "test_fuzz_recipes",
    "test_integrations",
    "test_interruptions",
    "test_kernels_attention_caps",
    "test_kernels_attention_caps_compile",
    "test_kernels_attention_caps_triton",
    "test_kernels_attention_divergence",
    "test_kernels_attention_divergence_ops",
    "test_kernels_attention_divergence_triton",
    "test_kernels_attention_reduction",
    "test_kernels_attention_score_mse",
    "test_kernels_calls",
    "test_kernels_compile",
    "test_kernels_hidden_cosine",
    "test_kernels_hidden_ops",
    "test_kernels_hidden_triton",
    "test_kernels_indexer_divergence",
    "test_kernels_indexer_divergence_ops",
    "test_kernels_logits_divergence",
    "test_kernels_logits_divergence_ops",
    "test_kernels_logits_divergence_triton",
    "test_kernels_ops",
    "test_kernels_properties",
    "test_kernels_short",
    "test_kernels_triton",
    "test_kernels_weighted_teacher",
    "test_models_checking",
    "test_objective_relation_heads",
    "test_pages",
    "test_run_lock",
    "test_similarity",
    "test_similarity_models",
    "test_study_real",
    "test_study_runs",
    "test_study_search",
    "test_study_tables",
}
# what takes longest begins first, so that no process waits for another at the end
LONGEST = (
    "test_gpu_runs",
    "test_host_reads",
    "test_ahead",
    "test_embeddings",
    "test_compile",
    "test_benchmarks_gpu",
    "test_study_results",
    "test_study_real",
    "test_kernels_properties",
    "test_tasks_training",
    "test_soak",
    "test_onnx",
    "test_checkpoint",
    "test_cli",
    "test_resume",
    "test_kernels_attention_divergence_triton",
    "test_kernels_attention_caps_triton",
    "test_finetune",
    "test_engine",
    "test_kernels_compile",
    "test_disk",
)
# CPU seconds that a test without the mark may take in its own process: twice what is asked for,
# because machines differ by so much
LIMIT = 20.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, their files aren't even imported."""
    left_out = config.option.markexpr == "not slow" and collection_path.stem in SLOW_FILES
    return True if left_out else None


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage goes through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What was imported may be taken down."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out, and put first what takes longest."""
    turns = {name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))
    for item in items:
        if item.path.stem in SLOW_FILES or _starts_processes(item):
            item.add_marker(pytest.mark.slow)


def _starts_processes(item: pytest.Item) -> bool:
    fixtures: Any = getattr(item, "_fixtureinfo", None)
    named = fixtures.name2fixturedefs.values() if fixtures is not None else ()
    functions = [definition.func for definitions in named for definition in definitions]
    return _reaches([getattr(item, "function", None), *functions])


def _reaches(functions: list[Any]) -> bool:
    """Whether functions name a starter, or one of the tests' own functions that does."""
    seen: set[Any] = set()
    while functions:
        function = functions.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        names = {*function.__code__.co_names}
        if names & STARTERS:
            return True
        functions += [
            found
            for name in names
            if (found := function.__globals__.get(name)) is not None
            and os.sep + "tests" + os.sep
            in getattr(getattr(found, "__code__", None), "co_filename", "")
        ]
    return False


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What fake runs of a study write down (`study_files.journal`)."""
    path = tmp_path / "journal"
    monkeypatch.setenv("FAKE_JOURNAL", str(path))
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of studies hold no pictures: drawing them takes longer than fake runs."""
    monkeypatch.setattr("fastkd.study.report.png", lambda figure: (b"", frozenset()))
    monkeypatch.setattr("fastkd.study.report.inline_svg", lambda figure, title: "<svg></svg>")


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Kernels' outputs that nobody writes show as NaN."""
    from kernel_cases import fresh_tensors_are_nan

    with fresh_tensors_are_nan():
        yield


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    from own_registries import registries_apart

    with registries_apart(monkeypatch, tmp_path):
        yield


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """This process as the only rank, for the tests of a module."""
    from fastkd.distributed import joined_ranks

    with joined_ranks() as joined:
        yield joined


@pytest.fixture(scope="module")
def own_accelerator() -> Iterator[None]:
    """Leave no precision and no device to the next module: accelerate keeps its first for all."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Tests replace what plans of kernels' calls are made with."""
    if (plan := sys.modules.get("fastkd_kernels.common.plan")) is not None:
        plan._plans.clear()


@pytest.fixture(autouse=True, scope="module")
def launcher_variables() -> Iterator[None]:
    """Leave nothing of a launcher behind: `start_ranks` and accelerate set some for themselves."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    names += ("ACCELERATE_MIXED_PRECISION",)
    found = {name: os.environ.get(name) for name in names}
    yield
    for name, value in found.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes long and doesn't say so."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    # on a GPU kernels are compiled first
    if took > LIMIT and not torch.cuda.is_available() and item.get_closest_marker("slow") is None:
        pytest.fail(f"{took:.0f} CPU seconds: mark it slow, or make it quick")
