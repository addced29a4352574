"""Run variants of a recipe whole, and once more stopped and resumed, in one process.

Used as `python resumed_variants.py recipe.yaml '[[true, "train.steps=4", ...], ...]'`, also under
torchrun; each variant writes to its `run.output`, and to the same with `-whole` behind it. Where
the first entry says so, the newest checkpoint is damaged before the run is resumed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastkd.distributed import (
    Ranks,
    start_ranks,
    stop_ranks,
)
from fastkd.recipe import load_recipe
from fastkd.reporting.console import Reporter
from fastkd.training import loop

STOP_IN_STEP = 4


class _Stopped(Exception):
    """Where a kill would be."""


def _stopping(step: int) -> Any:
    calls, original = 0, loop.train_step

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise _Stopped
        return original(*arguments)

    return counted


def _damage(run: Path) -> None:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    path = sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def main(ranks: Ranks) -> None:
    """All variants."""
    reporter = Reporter(silent=not ranks.is_main)
    for damaged, *overrides in json.loads(sys.argv[2]):
        recipe = load_recipe(sys.argv[1], overrides)
        run = Path(recipe.run.output)
        output = recipe.run.model_copy(update={"output": f"{run}-whole"})
        whole = recipe.model_copy(update={"run": output})
        loop.run_recipe(whole, ranks, resume=False, reporter=reporter)
        original = loop.train_step
        loop.train_step = _stopping(STOP_IN_STEP)
        try:
            loop.run_recipe(recipe, ranks, resume=False, reporter=reporter)
        except _Stopped:
            loop.train_step = original
        if damaged and ranks.is_main:
            _damage(run)
        ranks.barrier()
        loop.run_recipe(recipe, ranks, resume=True, reporter=reporter)


if __name__ == "__main__":
    joined = start_ranks()
    main(joined)
    stop_ranks()
