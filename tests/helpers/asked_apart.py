"""Ask ranks for different things, one after the other, and print as JSON what each is refused with.

Used as `python asked_apart.py recipe.yaml '[[WHAT, WHAT], ...]'`, under a launcher: what each rank
is asked for, as in `["evaluate", "train.micro_batch_size=2"]`. With `resume` for a command a run is
gone on with.
"""

import json
import sys
from pathlib import Path

from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.training.doctor import estimate_run
from fastkd.training.evaluate_run import evaluate_run
from fastkd.training.loop import run_recipe
from fastkd.training.run_folder import RunFolder


def ask(path: str, ranks: Ranks, command: str, *overrides: str) -> None:
    """Do what a rank is asked for."""
    reporter, recipe = Reporter(silent=True), load_any_recipe(path, list(overrides))
    if command == "evaluate":
        evaluate_run(RunFolder(Path(path).parent / "run"), overrides, ranks)
    elif command == "doctor":
        estimate_run(recipe, ranks, reporter)
    else:
        run_recipe(recipe, ranks, resume=command == "resume", reporter=reporter)


if __name__ == "__main__":
    ranks, said = start_ranks(), []
    for asked in json.loads(sys.argv[2]):
        try:
            ask(sys.argv[1], ranks, *asked[ranks.rank])
        except UserError as error:
            said.append(str(error))
        else:
            said.append("")
    everything = ranks.gather(said)
    stop_ranks()
    if ranks.is_main:
        print(json.dumps(everything))
