"""Run or resume variants of a recipe one after another in one process: imports are most of a test.

Used as `python run_recipes.py recipe.yaml '[["train.steps=1", ...], ...]'`, also under torchrun. A
variant that is refused doesn't keep the others from running: the lines come last, as one of JSON.
"""

import json
import sys

from fastkd.distributed import start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.training.loop import run_recipe

if __name__ == "__main__":
    ranks = start_ranks()
    refused: dict[int, str] = {}
    for number, overrides in enumerate(json.loads(sys.argv[2])):
        recipe = load_any_recipe(sys.argv[1], overrides)
        reporter = Reporter(silent=not ranks.is_main)
        try:
            run_recipe(recipe, ranks, resume=True, reporter=reporter)
        except UserError as error:
            refused[number] = str(error)
    stop_ranks()
    if refused and ranks.is_main:
        print(json.dumps(refused), file=sys.stderr)
        raise SystemExit(2)
