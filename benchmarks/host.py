"""Host time of the ops' calls, without a GPU: CPU microseconds of forward and backward, as JSON.

`python -m benchmarks.host [NAME...] [--output FILE] [--profile]`, without TRITON_INTERPRET; a name
is the start of a case's. Triton's ops run on a stand-in for a GPU (`stand_in.py`), so what a GPU
adds is the driver's part of each launch and copy. Backend "torch" is what CPU tensors run.
"""

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# inputs are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import fastkd_kernels
from indexer_cases import indexer_case
from kernel_cases import attention_states, hidden_case, leaves_of
from logits_cases import logits_case, tensors_of

from benchmarks.machine import machine
from benchmarks.stand_in import Launcher, stand_in_gpu

# the first calls compile
WARM_UP = 5
CALLS = 20
ROUNDS = 20
# microseconds of the loop of Python that every median is scaled to
YARDSTICK = 50.0
PAIRS = 4
BF16 = torch.bfloat16


class Step(NamedTuple):
    """One call's forward, and the leaves of its backward."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]


class Case(NamedTuple):
    """Makes a call on tensors that no other call has."""

    name: str
    make: Callable[[], Step]


def _attention(op: str, backend: str, **options: Any) -> Step:
    student, teacher = attention_states(PAIRS, 2, 2, 16, (16, 16), dtype=_dtype(backend))
    mask = torch.ones(2, 16, dtype=torch.bool)
    masks = {"key_mask": mask, "query_mask": mask}
    return Step(
        lambda: getattr(fastkd_kernels, op)(student, teacher, **masks, **options, backend=backend),
        leaves_of(student),
    )


def _relations(backend: str) -> Step:
    # as models lay them, heads of a token side by side, so that cutting them copies nothing
    student, teacher = (
        [state._replace(query=_by_token(state.query)) for state in side]
        for side in attention_states(PAIRS, 2, 2, 16, (16, 16), dtype=_dtype(backend))
    )
    mask = torch.ones(2, 16, dtype=torch.bool)
    # two heads of 16 are cut into four
    options: dict[str, Any] = {"relation": "qq", "relation_heads": 4, "backend": backend}
    return Step(
        lambda: fastkd_kernels.relation_divergence(student, teacher, key_mask=mask, **options),
        [state.query for state in student],
    )


def _by_token(heads: Tensor) -> Tensor:
    made = heads.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return made.requires_grad_(heads.requires_grad)


def _hidden(op: str, backend: str) -> Step:
    case = hidden_case(PAIRS, 2, 8, (16, 32), "shared+bias", _dtype(backend))
    mask = torch.ones(2, 8, dtype=torch.bool)
    options = {**case.trained, "mask": mask, "backend": backend}
    return Step(
        lambda: getattr(fastkd_kernels, op)(case.student, case.teacher, **options), case.leaves
    )


def _logits(backend: str) -> Step:
    case = logits_case(
        (2, 8), ("head", "head"), vocabularies=(32, 32), widths=(16, 16), dtype=_dtype(backend)
    )
    return Step(
        lambda: fastkd_kernels.logits_divergence(
            case.student, case.teacher, **case.options, backend=backend
        ),
        tensors_of(case.student),
    )


def _indexer(backend: str) -> Step:
    case = indexer_case(PAIRS, 2, 16, (16, 16), dtype=_dtype(backend))
    mask = torch.ones(2, 16, dtype=torch.bool)
    masks = {"key_mask": mask, "query_mask": mask}
    return Step(
        lambda: fastkd_kernels.indexer_divergence(
            case.student, case.teacher, **masks, backend=backend
        ),
        case.leaves,
    )


def _dtype(backend: str) -> torch.dtype:
    return torch.float32 if backend == "torch" else BF16


def cases() -> list[Case]:
    makers: dict[str, Callable[[str], Step]] = {
        "attention_score_mse tiles": partial(_attention, "attention_score_mse", algorithm="tiles"),
        "attention_score_mse gram": partial(_attention, "attention_score_mse", algorithm="gram"),
        "attention_divergence kl": partial(_attention, "attention_divergence"),
        "relation_divergence qq": _relations,
        "hidden_mse": partial(_hidden, "hidden_mse"),
        "hidden_cosine": partial(_hidden, "hidden_cosine"),
        "hidden_normalized_mse": partial(_hidden, "hidden_normalized_mse"),
        "logits_divergence kl": _logits,
        "indexer_divergence": _indexer,
    }
    return [
        Case(f"{name} {backend}", partial(make, backend))
        for backend in ("triton", "torch")
        for name, make in makers.items()
    ]


def _run(step: Step, taken: dict[str, list[float]]) -> None:
    start = time.thread_time()
    loss = step.forward()
    middle = time.thread_time()
    upstream = torch.ones_like(loss)
    begun = time.thread_time()
    gradients = torch.autograd.grad(loss, step.leaves, upstream)
    end = time.thread_time()
    # freeing is part of neither
    del gradients, loss
    taken["forward"].append(middle - start)
    taken["backward"].append(end - begun)


def _launches(step: Step) -> dict[str, int]:
    Launcher.launches = 0
    loss = step.forward()
    forward = Launcher.launches
    torch.autograd.grad(loss, step.leaves, torch.ones_like(loss))
    return {"forward": forward, "backward": Launcher.launches - forward}


def yardstick() -> float:
    """Microseconds of a loop of Python, which tell how fast the machine is at the moment."""
    taken = []
    for _ in range(5):
        start = time.thread_time()
        sum(number * number for number in range(1000))
        taken.append(time.thread_time() - start)
    return 1e6 * min(taken)


def measured(case: Case) -> dict[str, Any]:
    """Microseconds, with the same tensors in every call, and with new ones in each."""
    step = case.make()
    # every call's tensors live at once, so none has an address that was seen before
    fresh = [[case.make() for _ in range(CALLS)] for _ in range(ROUNDS)]
    for _ in range(WARM_UP):
        _run(step, {"forward": [], "backward": []})
    gc.collect()
    medians: dict[str, dict[str, list[float]]] = {"same tensors": {}, "new tensors": {}}
    loops = []
    for round_ in range(ROUNDS):
        for name, steps in (("same tensors", [step] * CALLS), ("new tensors", fresh[round_])):
            taken: dict[str, list[float]] = {"forward": [], "backward": []}
            loops.append(yardstick())
            for one in steps:
                _run(one, taken)
            for part, times in taken.items():
                scaled = 1e6 * statistics.median(times) * YARDSTICK / loops[-1]
                medians[name].setdefault(part, []).append(scaled)
    found: dict[str, Any] = {
        name: {part: round(statistics.median(times), 1) for part, times in parts.items()}
        for name, parts in medians.items()
    }
    loop = round(statistics.median(loops), 1)
    return found | {"triton launches": _launches(step), "yardstick": loop}


def profiled(case: Case) -> None:
    """What takes the time of forward, printed; the backward runs on autograd's own thread."""
    step = case.make()
    for _ in range(WARM_UP):
        step.forward()
    profile = cProfile.Profile()
    for _ in range(CALLS * ROUNDS):
        profile.enable()
        loss = step.forward()
        torch.autograd.grad(loss.sum(), step.leaves)
        profile.disable()
    print(f"\n{case.name}")
    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="starts of cases' names; all unless given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    given = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter has no launcher")
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        **machine(),
        "triton": triton.__version__,
        "pairs": PAIRS,
        "microseconds": {},
    }
    with stand_in_gpu():
        for case in cases():
            if given.names and not case.name.startswith(tuple(given.names)):
                continue
            if given.profile:
                profiled(case)
                continue
            found["microseconds"][case.name] = measured(case)
            print(case.name, json.dumps(found["microseconds"][case.name]), flush=True)
            if given.output is not None:
                given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
