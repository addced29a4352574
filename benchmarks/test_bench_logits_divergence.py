"""Forward and backward of logits_divergence against its definition, on the CPU and on a GPU.

On the CPU the op is held to a tenth of the definition's memory where the student's weight is small
enough for that: at a width of 1024, the weight's gradient alone is a tenth. On a GPU it stands
beside Liger-Kernel's `fused_linear_jsd` where that is installed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import logits_divergence, reference
from kernel_cases import errors, peak_bytes

from benchmarks import costs, liger
from benchmarks.cases import Case, baselines, cases
from benchmarks.inputs import logits_inputs
from benchmarks.workloads import LOGITS, LogitsWorkload

# 2048 tokens and 32k columns behind narrow students, as of encoders
NARROW = [
    LogitsWorkload(f"logits-32k-2048-width-{widths[0]}", 1, 0, 2048, widths, 32000)
    for widths in ((256, 512), (768, 768))
]
# what the definition's logits may take on a GPU
MOST_LOGITS = 1 << 29
# an op on the last layer knows no layer pairs
CASES = [made for made in cases([*NARROW, *LOGITS.values()]) if made.values[0].pairs == 1]


@pytest.mark.parametrize("kind", ["kl", "js"])
@pytest.mark.parametrize("case", CASES)
def test_logits_divergence(case: Case, kind: str, compare: Callable[..., Any]) -> None:
    work = case.work
    inputs = logits_inputs(work, case.dtype, kind, case.device)

    def step(function: Callable[..., Any]) -> Callable[[], list[torch.Tensor]]:
        return lambda: inputs.run(function)

    functions = {"op": step(logits_divergence)}
    if case.device == "cpu" or work.tokens * work.vocabulary <= MOST_LOGITS:
        functions |= baselines(step, reference.logits_divergence, case.device)
        given, expected = functions["op"](), functions["definition"]()
        assert max(errors(given, expected)) <= (1e-4 if case.device == "cpu" else 5e-2)
    if case.device != "cpu" and liger.is_installed():
        heads = (inputs.student, inputs.teacher)
        functions["liger"] = liger.liger_step(*heads, inputs.leaves, kind)
    compare(
        "op",
        functions,
        cost=costs.logits_divergence(work, 1, case.dtype),
        device=case.device,
        **work._asdict(),
        kind=kind,
    )
    if work == NARROW[0]:
        # memory does not depend on who else uses the machine
        assert peak_bytes(functions["op"]) <= peak_bytes(functions["definition"]) / 10
