"""Where a teacher of seven billion parameters and its student go on 1, 8 and 64 GPUs.

Forecasts, not measurements: what `fastkd doctor recipe.yaml --gpu NAME --ranks N` prints, for
several layouts side by side. `python -m benchmarks.placement` writes `results/placement.md`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import BertConfig

from fastkd.recipe import Recipe, parse_recipe
from fastkd.training.chips import CHIPS, ChipName
from fastkd.training.doctor import does_not_fit
from fastkd.training.forecast import EFFICIENCY, Passes, forecast, run_dry

PAGE = Path(__file__).parent / "results" / "placement.md"
STEP = PAGE.with_name("training-step-nvidia-h100-80gb-hbm3-256x128.json")
# a Llama of the sizes that transformers gives one without numbers: 6.7 billion parameters
TEACHER = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
STUDENT = {"layers": 8, "hidden_size": 2048, "heads": 32, "intermediate_size": 5504}
SHARD, OFFLOAD = {"placement": "shard"}, {"placement": "offload"}
# chip, GPUs, blocks of a step, blocks of a micro-batch, ZeRO stage, teacher
CASES: tuple[tuple[ChipName, int, int, int, int, dict[str, str]], ...] = (
    ("h100", 1, 64, 8, 1, {}),
    ("h100", 1, 64, 8, 1, OFFLOAD),
    ("l4", 1, 64, 2, 1, {}),
    ("l4", 1, 64, 1, 1, OFFLOAD),
    ("h100", 8, 64, 8, 1, {}),
    ("h100", 8, 64, 8, 2, SHARD),
    ("h100", 8, 64, 8, 3, SHARD),
    ("l4", 8, 64, 1, 1, {}),
    ("l4", 8, 64, 1, 2, SHARD),
    ("l4", 8, 64, 4, 2, SHARD),
    ("h100", 64, 512, 8, 1, {}),
    ("h100", 64, 512, 8, 2, SHARD),
    ("h100", 64, 512, 8, 3, SHARD),
)

COLUMNS = ("GPUs", "micro-batch", "`train.zero_stage`", "`teacher.placement`", "GiB a GPU, of")
COLUMNS += ("computing, s", "moving, s", "tokens/s")


def recipe_of(folder: Path, batch: int, micro: int, stage: int, teacher: dict[str, str]) -> Recipe:
    """The recipe of a case; its teacher is a folder with a configuration alone."""
    (folder / "config.json").write_text(json.dumps(TEACHER))
    train = {"precision": "bf16", "zero_stage": stage}
    tree: dict[str, Any] = {
        "teacher": {"model": str(folder), "dtype": "bfloat16", **teacher},
        "student": {**STUDENT, "head": "causal_lm"},
        "losses": {"attention": {}, "hidden": {}, "logits": {}},
        "data": {"train": "text", "block_size": 2048},
        "train": {"steps": 1000, "batch_size": batch, "micro_batch_size": micro, **train},
        "run": {"output": "run"},
    }
    return parse_recipe(tree)


def page() -> str:
    """All cases as a table."""
    lines = [
        "# Forecasts for a teacher of 7 B",
        "",
        "`python -m benchmarks.placement`: what `fastkd doctor --gpu --ranks` computes; nothing of "
        "it was measured.",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        first = recipe_of(Path(folder), 8, 8, 1, {})
        passes = run_dry(first, 8)
        rows = [_row(Path(folder), passes, *case) for case in CASES]
    lines += [
        f"Llama of {passes.teacher_numbers / 1e9:.2f} B in bf16 to a student of "
        f"{passes.trained_numbers / 1e9:.2f} B with projections, {STUDENT['layers']} x "
        f"{STUDENT['hidden_size']}; losses attention, hidden, logits; blocks of {passes.tokens} "
        f"tokens; computing at {EFFICIENCY:.0%} of the chip's rate.",
        "",
        f"| {' | '.join(COLUMNS)} | |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *_measured(),
        "",
    ]
    return "\n".join(lines)


def _measured() -> list[str]:
    """The forecast of a step that was measured."""
    found = json.loads(STEP.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(Path(folder), found["batch"], found["batch"], 1, {})
        BertConfig(architectures=["BertModel"]).save_pretrained(folder)
        tree = recipe.model_dump(mode="json", exclude_none=True)
        tree["student"] = {"layers": 4, "hidden_size": 312, "heads": 12, "intermediate_size": 1200}
        tree["losses"] = {"attention": {}, "hidden": {}, "embedding": {}}
        tree["data"]["block_size"] = found["tokens"]
        small = parse_recipe(tree)
        seconds = forecast(small, run_dry(small, found["batch"]), CHIPS["h100"], 1).computing
    busy = found["on the gpu"]["fastkd"]["busy milliseconds"]
    return [
        "## Beside a measurement",
        "",
        f"{found['what']}, {found['batch']} x {found['tokens']} tokens in bf16 on one "
        f"{found['gpu']}: computing is forecast as {1000 * seconds:.1f} ms; its kernels were "
        f"measured to run for {busy:.1f} ms ([`{STEP.name}`]({STEP.name})).",
    ]


def _row(
    folder: Path,
    passes: Passes,
    name: ChipName,
    ranks: int,
    batch: int,
    micro: int,
    stage: int,
    teacher: dict[str, str],
) -> str:
    recipe, chip = recipe_of(folder, batch, micro, stage, teacher), CHIPS[name]
    found = forecast(recipe, passes, chip, ranks)
    fits = found.total <= chip.memory
    cells = [
        f"{ranks} x {chip.label}",
        str(micro),
        str(stage),
        recipe.teacher.placement,
        f"{found.total / 2**30:.1f}, {chip.memory / 2**30:.1f}",
        f"{found.computing:.3g}",
        f"{found.moving:.3g}",
        f"{found.speed:,.0f}" if fits else "-",
        "" if fits else does_not_fit(recipe, passes, chip, ranks),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
