"""Everything that needs a GPU, in eight minutes: `python -m benchmarks.gpu --out DIR`.

Stages in order, each with a share of the time and a JSON of its own; what fails or takes too long
is written there, and the next one is run. Then one page, `DIR/gpu-<name>.md`. `--device cpu` tries
all of it with tiny shapes and Triton's interpreter.

Exit code: 1 if a stage failed, 2 for bad arguments.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.report import write_page
from benchmarks.gpu.stages import STAGES, file_of, read, run_stages

# of the budget: for the page, and for a process that takes a moment to end
RESERVE_SECONDS = 5.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; 480 unless given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only",
        action="append",
        choices=[stage.name for stage in STAGES],
        help="this stage, may be repeated; the results of the others stay",
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="start of a kernel case's name, may be repeated; some are timed only if asked for",
    )
    given = parser.parse_args()
    if given.budget <= 0:
        refuse(f"--budget is {given.budget:g} seconds; give more than 0")
    if given.out.exists() and not given.out.is_dir():
        refuse(f"--out {given.out} is a file; give a folder")
    ours = [file_of(stage, given.out) for stage in STAGES]
    if given.out.exists() and any(given.out.iterdir()) and not any(f.exists() for f in ours):
        refuse(f"--out {given.out} holds other files; give a new folder, or one of earlier results")
    # one that was killed has said nothing
    there = [read(file).get("device", given.device) for file in ours if file.exists()]
    others = set(there) - {given.device}
    if given.only and others:
        refuse(f"--out {given.out} has results of --device {others.pop()}; give another folder")
    if given.device == "cuda":
        # a dry run needs no torch here
        import torch

        if not torch.cuda.is_available():
            refuse("no CUDA device is there; --device cpu makes a dry run")
    return given


def refuse(reason: str) -> None:
    print(reason, file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.only:
        for old in (*(file_of(stage, given.out) for stage in STAGES), *given.out.glob("gpu-*.md")):
            old.unlink(missing_ok=True)
    stages = [stage for stage in STAGES if not given.only or stage.name in given.only]
    budget = given.budget - min(RESERVE_SECONDS, given.budget / 2)
    well = run_stages(stages, given.out, given.device, budget, cases=given.case)
    print(write_page(given.out))
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
