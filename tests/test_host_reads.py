"""A training step in the steady state reads nothing from the device: on a GPU each read waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from device_marks import no_wait
from tiny_runs import make_recipe
from tiny_training import save_classifier, write_recipe, write_task
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.data.prefetch import DEPTH, Prefetched
from fastkd.distributed import joined_ranks
from fastkd.recipe import Recipe, load_recipe
from fastkd.training.loop import read_step, train_step
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.plan import plan_for_run
from fastkd.training.window import Window
from fastkd.types import LENGTHS

# what hands numbers, or a shape that depends on numbers, to the host
OPS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
WARM_UP = 2


class ReadOps(TorchDispatchMode):
    """Counts reads that ops make."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in OPS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class ReadMethods(TorchFunctionMode):
    """Counts reads that Python makes, but of tensors that stay on the host: on a CPU some of them
    are no op."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found
        self.kept: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS and id(args[0]) not in self.kept:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_reads_are_seen() -> None:
    reads = Counter[str]()
    numbers = torch.arange(3)
    with ReadOps(reads), ReadMethods(reads):
        numbers.tolist()
        bool(numbers.any())
        numbers[numbers > 1]
    assert reads["tolist"] == 1 and reads["__bool__"] == 1 and reads["index"] == 1, reads


def text_recipe(folder: Path, architecture: str = "bert", **sections: Any) -> Recipe:
    return load_recipe(make_recipe(folder, architecture, **sections), [])


def task_recipe(
    folder: Path, padding: str = "buckets", losses: Any = None, **teacher: str
) -> Recipe:
    """Padded or packed batches of a classifier."""
    write_task(folder / "task")
    save_classifier(folder / "classifier")
    teacher = {**teacher, "model": str(folder / "classifier"), "cache_folder": str(folder / "c")}
    sections = {"train": {"micro_batch_size": 4}, "task": {"padding": padding}}
    if losses is not None:
        sections["losses"] = losses
    return load_recipe(write_recipe(folder, "run", teacher=teacher, **sections), [])


RECIPES = {
    "text": lambda folder: text_recipe(folder),
    "text, micro-batches, checkpointing": lambda folder: text_recipe(
        folder,
        train={"micro_batch_size": 4, "log_every": 100},
        student={"layers": 2, "gradient_checkpointing": True},
        losses={
            "rkd": {"kind": "angle"},
            "far": {"loss": "rkd"},
            "similarity": {"kind": "kl", "dimensions": [8]},
        },
    ),
    "text, more losses": lambda folder: text_recipe(
        folder,
        losses={
            "relations": {"relation_heads": 4},
            "divergence": {"loss": "attention", "kind": "kl"},
            "balance": {"kind": "ratio", "reference": "hidden"},
        },
    ),
    "text, hidden states alone": lambda folder: text_recipe(folder, losses={"attention": None}),
    **{
        # a decoder's positions may be those of several sequences in a row
        f"text, {decoder}": lambda folder, decoder=decoder: text_recipe(folder, decoder)
        for decoder in ("llama", "gpt2")
    },
    "text, a decoder's hidden states alone": lambda folder: text_recipe(
        folder, "llama", losses={"attention": None}
    ),
    "text, profiled": lambda folder: text_recipe(folder, train={"profile": True}),
    "task": task_recipe,
    "task, logits alone": lambda folder: task_recipe(folder, losses={"logits": {}}),
    "task, packed": lambda folder: task_recipe(folder, "none"),
    "task, stored states": lambda folder: task_recipe(
        folder, cache="bfloat16", cache_attention="recomputed"
    ),
}


@contextmanager
def steps_of(recipe: Recipe) -> Iterator[tuple[Run, Prefetched, Window]]:
    """A run, what it reads, and the window that its losses are added to."""
    with joined_ranks() as ranks:
        run = set_up(recipe, ranks, progress=False)
        cache = plan_for_run(run)
        if cache is not None:
            cache.use(run, progress=False)
        with closing(Prefetched(run.micro_batches(), ranks.device, DEPTH)) as micro_batches:
            yield run, micro_batches, Window(run, micro_batches, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_reads_nothing(tmp_path: Path, name: str) -> None:
    with steps_of(RECIPES[name](tmp_path)) as (run, micro_batches, window):
        for step in range(WARM_UP + 3):
            reads = Counter[str]()
            methods = ReadMethods(reads)
            steady = step >= WARM_UP
            waits = no_wait() if steady else nullcontext()
            with ReadOps(reads), methods, waits, run.profile.step():
                inputs = read_step(run, micro_batches, step)
                methods.kept = {id(part[LENGTHS]) for part in inputs if LENGTHS in part}
                window.add(train_step(run, inputs))
            if steady:
                assert not reads, (step, reads)
        record, _ = window.close(stop=False)
        assert record["loss"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"compile": True}},
        {"train": {"cuda_graph": True}},
        {"train": {"cuda_graph": True, "compile": True}},
        {"train": {"optimizer": "muon"}},
        {"teacher": {"overlap": True}},
        {"teacher": {"dtype": "float8"}},
    ],
)
def test_a_step_that_is_compiled_recorded_or_overlapped_waits_for_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "float8" in str(changes) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a CUDA device that multiplies float8")
    with steps_of(text_recipe(tmp_path, **changes)) as (run, micro_batches, window):
        for step in range(WARM_UP + 3):
            with no_wait() if step >= WARM_UP else nullcontext():
                window.add(train_step(run, read_step(run, micro_batches, step)))
        record, _ = window.close(stop=False)
        assert record["loss"] > 0
